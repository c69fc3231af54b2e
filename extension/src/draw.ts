/** Paints a scene on a canvas: what can be seen, nothing else. */

import { BOX, type Scene, TASK } from "./scene.ts";
import { FINISHED, ORDER, STATES, type Store } from "./store.ts";

export const GLYPHS = ["○", "◔", "◑", "▶", "✓", "✕", "–", "↻"];

export interface Theme {
    paper: string;
    ink: string;
    faint: string;
    accent: string;
    states: string[];
    font: string;
}

export interface Camera {
    x: number;
    y: number;
    scale: number;
}

export interface Marks {
    hover: number;
    hoverGroup: number;
    chosen: number;
    chosenGroup: number;
    /** Nodes that a filter or a search leaves out are pale: of each, 1 if it is kept; null without one. */
    kept: Uint8Array | null;
    /** The same of each group: whether one of its tasks is kept. */
    keptGroups: Uint8Array | null;
}

/** Edges between tasks that are drawn at most; of more, nobody could follow one. */
const MOST_EDGES = 2000;

export function paint(
    context: CanvasRenderingContext2D, width: number, height: number, store: Store, scene: Scene, camera: Camera, theme: Theme, marks: Marks,
): void {
    context.fillStyle = theme.paper;
    context.fillRect(0, 0, width, height);
    context.save();
    context.translate(-camera.x * camera.scale, -camera.y * camera.scale);
    context.scale(camera.scale, camera.scale);
    const view = { left: camera.x, top: camera.y, right: camera.x + width / camera.scale, bottom: camera.y + height / camera.scale };
    if (scene.mode === "groups") {
        paintGroupEdges(context, store, scene, theme);
        scene.boxes.forEach((_, group) => paintBox(context, store, scene, group, camera.scale, theme, marks));
    }
    paintEdges(context, store, scene, view, camera.scale, theme, marks);
    paintNodes(context, store, scene, view, camera.scale, theme, marks);
    context.restore();
}

interface View {
    left: number;
    top: number;
    right: number;
    bottom: number;
}

function dash(kind: number): number[] {
    return kind === 1 ? [2, 3] : kind === 2 ? [7, 3] : [];
}

function curve(context: CanvasRenderingContext2D, x1: number, y1: number, x2: number, y2: number): void {
    const bend = Math.max(14, Math.abs(x2 - x1) / 2);
    context.moveTo(x1, y1);
    context.bezierCurveTo(x1 + bend, y1, x2 - bend, y2, x2, y2);
}

function paintGroupEdges(context: CanvasRenderingContext2D, store: Store, scene: Scene, theme: Theme): void {
    context.strokeStyle = theme.faint;
    for (const { source, target, kind, count } of store.groupEdges.values()) {
        const [from, to] = [scene.boxes[source], scene.boxes[target]];
        context.setLineDash(dash(kind));
        context.lineWidth = Math.min(6, 1 + Math.log10(count));
        context.beginPath();
        curve(context, from.x + from.width, from.y + BOX.height / 2, to.x, to.y + BOX.height / 2);
        context.stroke();
    }
    context.setLineDash([]);
}

function paintBox(
    context: CanvasRenderingContext2D, store: Store, scene: Scene, number: number, scale: number, theme: Theme, marks: Marks,
): void {
    const box = scene.boxes[number];
    const group = store.groups[number];
    context.globalAlpha = marks.keptGroups && !marks.keptGroups[number] ? 0.25 : 1;
    const lit = marks.hoverGroup === number || marks.chosenGroup === number;
    context.beginPath();
    context.roundRect(box.x, box.y, box.width, box.height, group.actor ? 12 : 5);
    context.fillStyle = theme.paper;
    context.fill();
    context.strokeStyle = lit ? theme.accent : theme.faint;
    context.lineWidth = lit ? 2.4 : 1.2;
    context.stroke();
    const size = group.members.length;
    if (scale > 0.22) {
        context.fillStyle = theme.ink;
        context.font = `600 13px ${theme.font}`;
        context.textBaseline = "middle";
        context.fillText(clip(context, `${box.open ? "▾" : "▸"} ${group.name}`, box.width - 70), box.x + 10, box.y + 15);
        context.font = `11px ${theme.font}`;
        context.textAlign = "right";
        context.fillText(group.title, box.x + box.width - 10, box.y + 15);
        context.fillText(size.toLocaleString("en"), box.x + box.width - 10, box.y + 34);
        context.textAlign = "left";
    }
    let x = box.x + 10;
    for (const state of ORDER) {
        const part = ((BOX.width - 70) * group.counts[state]) / Math.max(1, size);
        if (!part) continue;
        context.fillStyle = theme.states[state];
        context.fillRect(x, box.y + 29, Math.max(part, 2), 10);
        x += part;
    }
    context.globalAlpha = 1;
}

function paintEdges(
    context: CanvasRenderingContext2D, store: Store, scene: Scene, view: View, scale: number, theme: Theme, marks: Marks,
): void {
    const { source, target, edgeKind, group } = store;
    const { x, y, nodeWidths, nodeHeights } = scene;
    const focus = marks.hover >= 0 ? marks.hover : marks.chosen;
    // Between the cells of opened groups only those of the task that is looked at: all of them would cover everything.
    const all = scene.mode === "tasks" && (store.edges < MOST_EDGES || TASK.height * scale > 2);
    const lines: [number[], number[], number[]] = [[], [], []];
    const lit: number[] = [];
    let found = 0;
    const inside = (left: number, top: number) => left >= view.left - TASK.width && left <= view.right && top >= view.top - TASK.height && top <= view.bottom;
    for (let edge = 0; edge < store.edges; edge++) {
        const [from, to] = [source[edge], target[edge]];
        const near = from === focus || to === focus;
        if (!near && (!all || found >= MOST_EDGES)) continue;
        const x1 = x[from] + nodeWidths[group[from]];
        const x2 = x[to];
        // Of a node that is not drawn the comparisons with NaN are false.
        if (!(Math.min(x1, x2) <= view.right && Math.max(x1, x2) >= view.left)) continue;
        if (Math.min(y[from], y[to]) > view.bottom || Math.max(y[from], y[to]) + nodeHeights[group[to]] < view.top) continue;
        if (near) lit.push(edge);
        // In a large graph, edges that only pass through would hide what they pass.
        else if (store.edges < MOST_EDGES || inside(x[to], y[to]) || inside(x[from], y[from])) {
            found++;
            lines[edgeKind[edge] as 0 | 1 | 2].push(edge);
        }
    }
    const draw = (edges: number[], kind: number, colour: string, width: number, alpha: number) => {
        if (!edges.length) return;
        context.strokeStyle = colour;
        context.globalAlpha = alpha;
        context.lineWidth = Math.max(width, 0.6 / scale);
        context.setLineDash(dash(kind));
        context.beginPath();
        for (const edge of edges) {
            const [from, to] = [source[edge], target[edge]];
            curve(context, x[from] + nodeWidths[group[from]], y[from] + nodeHeights[group[from]] / 2, x[to], y[to] + nodeHeights[group[to]] / 2);
        }
        context.stroke();
    };
    lines.forEach((edges, kind) => draw(edges, kind, theme.faint, 1.2, found > 800 ? 0.45 : 0.9));
    draw(lit, 0, theme.accent, 2, 1);
    context.setLineDash([]);
    context.globalAlpha = 1;
}

function paintNodes(
    context: CanvasRenderingContext2D, store: Store, scene: Scene, view: View, scale: number, theme: Theme, marks: Marks,
): void {
    const { x, y, nodeWidths, nodeHeights } = scene;
    const { group } = store;
    const visible: number[][] = STATES.map(() => []);
    for (let node = 0; node < store.nodes; node++) {
        const of = group[node];
        if (x[node] <= view.right && x[node] + nodeWidths[of] >= view.left && y[node] <= view.bottom && y[node] + nodeHeights[of] >= view.top)
            visible[store.state[node]].push(node);
    }
    const least = 1.5 / scale;
    const total = visible.reduce((sum, nodes) => sum + nodes.length, 0);
    if (total > MAP && TASK.height * scale < 9) {
        paintMap(context, store, scene, visible, view, scale, theme, marks);
        paintMarks(context, store, scene, scale, theme, marks);
        return;
    }
    const boxed = scene.mode === "tasks" && TASK.height * scale > 9;
    visible.forEach((nodes, state) => {
        for (const pale of marks.kept ? [1, 0] : [0]) {
            const alpha = pale ? 0.15 : 1;
            const chosen = marks.kept ? nodes.filter((node) => marks.kept?.[node] === 1 - pale) : nodes;
            if (!chosen.length) continue;
            context.globalAlpha = alpha;
            context.fillStyle = context.strokeStyle = theme.states[state];
            context.lineWidth = 1.4;
            if (boxed) {
                paintTasks(context, store, scene, chosen, state, theme, alpha);
                continue;
            }
            for (const node of chosen) {
                const of = group[node];
                context.fillRect(x[node], y[node], Math.max(nodeWidths[of], least), Math.max(nodeHeights[of], least));
            }
            if (scene.mode === "groups" && state !== FINISHED) paintGlyphs(context, store, scene, chosen, state, scale, theme);
        }
    });
    context.globalAlpha = 1;
    paintMarks(context, store, scene, scale, theme, marks);
}

function paintMarks(context: CanvasRenderingContext2D, store: Store, scene: Scene, scale: number, theme: Theme, marks: Marks): void {
    const { x, y, nodeWidths, nodeHeights } = scene;
    for (const node of [marks.hover, marks.chosen]) {
        if (node < 0 || node >= store.nodes || Number.isNaN(x[node])) continue;
        const of = store.group[node];
        context.strokeStyle = theme.accent;
        context.lineWidth = Math.max(2, 2 / scale);
        context.strokeRect(x[node] - 2, y[node] - 2, nodeWidths[of] + 4, nodeHeights[of] + 4);
    }
}

/** Tasks in sight above which they are set as pixels: a rectangle by a call of the canvas costs a microsecond. */
const MAP = 5000;

let board: OffscreenCanvas | null = null;

function paintMap(
    context: CanvasRenderingContext2D, store: Store, scene: Scene, visible: number[][], view: View, scale: number, theme: Theme, marks: Marks,
): void {
    const width = Math.max(1, Math.ceil((view.right - view.left) * scale));
    const height = Math.max(1, Math.ceil((view.bottom - view.top) * scale));
    if (!board || board.width !== width || board.height !== height) board = new OffscreenCanvas(width, height);
    const ground = board.getContext("2d");
    if (!ground) return;
    const image = ground.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    for (const [state, nodes] of visible.entries()) {
        const [red, green, blue] = (theme.states[state].match(/\d+/g) ?? ["128", "128", "128"]).map(Number);
        const colour = ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
        const pale = ((38 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
        for (const node of nodes) {
            const of = store.group[node];
            const left = Math.max(0, Math.floor((scene.x[node] - view.left) * scale));
            const top = Math.max(0, Math.floor((scene.y[node] - view.top) * scale));
            const right = Math.min(width, left + Math.max(1, Math.floor(scene.nodeWidths[of] * scale)));
            const bottom = Math.min(height, top + Math.max(1, Math.floor(scene.nodeHeights[of] * scale)));
            const value = marks.kept && !marks.kept[node] ? pale : colour;
            for (let row = top; row < bottom; row++) pixels.fill(value, row * width + left, row * width + right);
        }
    }
    ground.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(board, view.left, view.top, width / scale, height / scale);
}

/** Cells of all states but "finished", which is the ground of a graph, carry their glyph where it can be read. */
function paintGlyphs(
    context: CanvasRenderingContext2D, store: Store, scene: Scene, nodes: number[], state: number, scale: number, theme: Theme,
): void {
    context.fillStyle = theme.paper;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const node of nodes) {
        const size = scene.nodeWidths[store.group[node]];
        if (size * scale < 9) continue;
        context.font = `${Math.round(size * 0.75)}px ${theme.font}`;
        context.fillText(GLYPHS[state], scene.x[node] + size / 2, scene.y[node] + size / 2 + 0.5);
    }
    context.textAlign = "left";
}

function paintTasks(
    context: CanvasRenderingContext2D, store: Store, scene: Scene, nodes: number[], state: number, theme: Theme, alpha: number,
): void {
    const { x, y } = scene;
    const { width: nodeWidth, height: nodeHeight } = TASK;
    context.beginPath();
    for (const node of nodes) context.roundRect(x[node], y[node], nodeWidth, nodeHeight, store.kind[node] ? 13 : 4);
    context.fillStyle = theme.paper;
    context.globalAlpha = 1;
    context.fill();
    context.fillStyle = theme.states[state];
    context.globalAlpha = 0.2 * alpha;
    context.fill();
    context.globalAlpha = alpha;
    context.stroke();
    context.font = `12px ${theme.font}`;
    context.textBaseline = "middle";
    for (const node of nodes) {
        context.fillText(GLYPHS[state], x[node] + 8, y[node] + nodeHeight / 2 + 0.5);
    }
    context.fillStyle = theme.ink;
    for (const node of nodes) {
        context.fillText(clip(context, store.groups[store.group[node]].name, nodeWidth - 34), x[node] + 26, y[node] + nodeHeight / 2 + 0.5);
    }
}

const clipped = new Map<string, string>();

/** A text that fits into so many units; measured once. */
function clip(context: CanvasRenderingContext2D, text: string, width: number): string {
    const key = `${context.font} ${width} ${text}`;
    let fits = clipped.get(key);
    if (fits === undefined) {
        fits = text;
        for (let length = text.length - 1; length > 1 && context.measureText(fits).width > width; length--) fits = `${text.slice(0, length)}…`;
        if (clipped.size > 5000) clipped.clear();
        clipped.set(key, fits);
    }
    return fits;
}
