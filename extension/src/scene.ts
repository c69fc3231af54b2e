/** Where things are drawn: from a store to rectangles, in units of the picture. No DOM. */

import type { Store } from "./store.ts";

export const TASK = { width: 132, height: 26, stepX: 176, stepY: 36 };
export const BOX = { width: 210, height: 50, stepX: 280, stepY: 70, inset: 10, top: 46 };
/** Sizes of the cells of an opened group, by how many tasks it has at most: a large one is a map, a small one can be read. */
export const CELLS = [
    { most: 400, size: 14, step: 17 },
    { most: 4000, size: 8, step: 10 },
    { most: Number.POSITIVE_INFINITY, size: 5, step: 6 },
];
/** Rows of a column of tasks, after which it goes on beside itself: ten thousand tasks side by side are no thread of one pixel. */
const WRAP = 40;

/** The same for larger columns. By powers of two, so that tasks change their places a few times only while a graph grows. */
export function wrapOf(rows: number): number {
    let wrap = WRAP;
    while (wrap * wrap < 1.6 * rows) wrap *= 2;
    return wrap;
}

/** Tasks above which the groups are shown first. */
export const LARGE = 300;

export interface Box {
    x: number;
    y: number;
    width: number;
    height: number;
    open: boolean;
}

function cellOf(count: number): { most: number; size: number; step: number } {
    return CELLS.find((each) => count <= each.most) ?? CELLS[0];
}

export type Mode = "tasks" | "groups";

export class Scene {
    mode: Mode = "tasks";
    boxes: Box[] = [];
    /** Of each node its upper left corner; NaN if it is not drawn. */
    x = new Float32Array(0);
    y = new Float32Array(0);
    width = 0;
    height = 0;
    /** Of each group: width and height of what stands for one of its tasks. */
    nodeWidths: number[] = [];
    nodeHeights: number[] = [];

    /** Places everything anew: linear in the number of nodes that are drawn. */
    arrange(store: Store, mode: Mode, open: ReadonlySet<number>): void {
        this.mode = mode;
        if (this.x.length < store.nodes) {
            this.x = new Float32Array(store.nodes * 2);
            this.y = new Float32Array(store.nodes * 2);
        }
        this.width = this.height = 0;
        const sizes = store.groups.map((group) => cellOf(group.members.length).size);
        this.nodeWidths = mode === "tasks" ? sizes.map(() => TASK.width) : sizes;
        this.nodeHeights = mode === "tasks" ? sizes.map(() => TASK.height) : sizes;
        if (mode === "tasks") this.arrangeTasks(store);
        else this.arrangeGroups(store, open);
    }

    private arrangeTasks(store: Store): void {
        this.boxes = [];
        const { columns, rows, heights } = store.layout;
        const wrap = wrapOf(heights.reduce((most, height) => Math.max(most, height), 0));
        const starts: number[] = [];
        let x = 0;
        for (const height of heights) {
            starts.push(x);
            x += (Math.floor(height / wrap) + 1) * TASK.stepX;
            this.height = Math.max(this.height, Math.min(height, wrap - 1) * TASK.stepY + TASK.height);
        }
        this.width = Math.max(0, x - TASK.stepX + TASK.width);
        for (let node = 0; node < store.nodes; node++) {
            const row = rows[node];
            this.x[node] = starts[columns[node]] + Math.floor(row / wrap) * TASK.stepX;
            this.y[node] = (row % wrap) * TASK.stepY;
        }
    }

    private arrangeGroups(store: Store, open: ReadonlySet<number>): void {
        this.x.fill(Number.NaN, 0, store.nodes);
        const { columns, rows } = store.groupLayout;
        const sizes = store.groups.map((group, number) => {
            if (!open.has(number)) return { width: BOX.width, height: BOX.height, deep: 0 };
            const count = Math.max(1, group.members.length);
            const deep = Math.max(1, Math.ceil(Math.sqrt(count / 2)));
            const { step } = cellOf(count);
            const width = Math.ceil(count / deep) * step + 2 * BOX.inset;
            return { width: Math.max(BOX.width, width), height: deep * step + BOX.top + BOX.inset, deep };
        });
        const wide: number[] = [];
        for (let g = 0; g < store.groups.length; g++) wide[columns[g]] = Math.max(wide[columns[g]] ?? 0, sizes[g].width);
        const starts: number[] = [];
        let x = 0;
        for (const width of wide) {
            starts.push(x);
            x += width + BOX.stepX - BOX.width;
        }
        this.boxes = new Array(store.groups.length);
        const order = store.groups.map((_, g) => g).sort((a, b) => columns[a] - columns[b] || rows[a] - rows[b]);
        let extra = 0;
        let column = -1;
        for (const g of order) {
            if (columns[g] !== column) [column, extra] = [columns[g], 0];
            const { width, height, deep } = sizes[g];
            const box = { x: starts[column], y: rows[g] * BOX.stepY + extra, width, height, open: open.has(g) };
            extra += height - BOX.height;
            this.boxes[g] = box;
            this.width = Math.max(this.width, box.x + width);
            this.height = Math.max(this.height, box.y + height);
            if (!deep) continue;
            const { step } = cellOf(store.groups[g].members.length);
            store.groups[g].members.forEach((node, k) => {
                this.x[node] = box.x + BOX.inset + Math.floor(k / deep) * step;
                this.y[node] = box.y + BOX.top + (k % deep) * step;
            });
        }
    }

    /** What lies at a point: a node before the group around it. */
    at(store: Store, x: number, y: number): { node: number; group: number } {
        let group = -1;
        if (this.mode === "groups") {
            group = this.boxes.findIndex((box) => x >= box.x && x < box.x + box.width && y >= box.y && y < box.y + box.height);
            if (group < 0 || !this.boxes[group].open) return { node: -1, group };
        }
        for (let node = 0; node < store.nodes; node++) {
            const of = store.group[node];
            if (x >= this.x[node] && x < this.x[node] + this.nodeWidths[of] && y >= this.y[node] && y < this.y[node] + this.nodeHeights[of]) return { node, group };
        }
        return { node: -1, group };
    }
}
