/** One view of a store in the page: toolbar, canvas, inspector, and a table of the same for screen readers. */

import { type Camera, GLYPHS, type Marks, paint, type Theme } from "./draw.ts";
import { LARGE, type Mode, Scene, TASK } from "./scene.ts";
import { CANCELLED, FAILED, FINISHED, ORDER, RETRIED, RUNNING, STATES, type Store } from "./store.ts";

const NAMES = ["waiting", "queued", "sent", "running", "finished", "failed", "cancelled", "retried"];
/** Scale below which the names of tasks cannot be read. */
const READABLE = 0.45;
const LEAST = 0.002;
const FILTERS: Record<string, string> = { "": "all tasks", active: "active", failed: "failed", slow: "slowest" };

function element<K extends keyof HTMLElementTagNameMap>(tag: K, name: string, parent: HTMLElement): HTMLElementTagNameMap[K] {
    const made = document.createElement(tag);
    if (name) made.className = `nbray-${name}`;
    parent.append(made);
    return made;
}

/** ``340 ms``, ``2.5 s``, ``3 min``. */
export function duration(seconds: number): string {
    if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
    if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
    return seconds < 120 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : `${Math.round(seconds / 60)} min`;
}

export class GraphView {
    private readonly store: Store;
    private readonly root: HTMLElement;
    private readonly counts: HTMLElement;
    private readonly switch: HTMLButtonElement;
    private readonly filter: HTMLSelectElement;
    private readonly search: HTMLInputElement;
    private readonly canvas: HTMLCanvasElement;
    private readonly inspector: HTMLElement;
    private readonly mirror: HTMLTableElement;
    private readonly live: HTMLElement;
    private readonly scene = new Scene();
    private readonly camera: Camera = { x: 0, y: 0, scale: 1 };
    private readonly marks: Marks = { hover: -1, hoverGroup: -1, chosen: -1, chosenGroup: -1, kept: null, keptGroups: null };
    private readonly open = new Set<number>();
    private readonly stop = new AbortController();
    private readonly watchers: { disconnect(): void }[] = [];
    private mode: Mode | "" = "";
    private natural: Mode = "tasks";
    private arranged = -1;
    private moved = false;
    private pending = 0;
    private told = 0;
    private theme: Theme | null = null;
    private readonly touched: () => void;

    constructor(parent: HTMLElement, store: Store, title: string, touched: () => void) {
        this.store = store;
        this.touched = touched;
        this.root = element("div", "graph", parent);
        const bar = element("div", "bar", this.root);
        element("span", "title", bar).textContent = title;
        this.counts = element("span", "counts", bar);
        this.search = element("input", "", bar);
        this.search.type = "search";
        this.search.placeholder = "Find function";
        this.search.setAttribute("aria-label", "Find tasks by the name of their function");
        this.filter = element("select", "", bar);
        this.filter.setAttribute("aria-label", "Which tasks to show brightly");
        for (const [value, label] of Object.entries(FILTERS)) this.filter.append(new Option(label, value));
        this.switch = element("button", "", bar);
        const fit = element("button", "", bar);
        fit.textContent = "Fit";
        fit.title = "Show all of it (key 0)";
        const stage = element("div", "stage", this.root);
        this.canvas = element("canvas", "", stage);
        this.canvas.tabIndex = 0;
        this.canvas.setAttribute("role", "application");
        this.canvas.setAttribute("aria-label", `${title}. Arrow keys go from one to the next, Enter opens a group, plus and minus zoom, 0 shows all.`);
        this.inspector = element("div", "inspect", stage);
        const mirror = element("div", "mirror", this.root);
        this.live = element("div", "", mirror);
        this.live.setAttribute("role", "status");
        this.mirror = element("table", "", mirror);
        const options = { signal: this.stop.signal };
        this.search.addEventListener("input", () => this.refilter(), options);
        this.filter.addEventListener("change", () => this.refilter(), options);
        this.switch.addEventListener("click", () => this.toggle(), options);
        fit.addEventListener("click", () => this.fit(), options);
        this.listen(options);
        const resized = new ResizeObserver(() => this.update());
        resized.observe(stage);
        const themed = new MutationObserver(() => this.retheme());
        themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class", "style"] });
        this.watchers.push(resized, themed);
        matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.retheme(), options);
        this.update();
    }

    /** Draw the store's present, with the next picture of the page. */
    update(): void {
        if (!this.pending) this.pending = requestAnimationFrame(() => this.frame());
    }

    remove(): void {
        this.stop.abort();
        for (const watcher of this.watchers) watcher.disconnect();
        cancelAnimationFrame(this.pending);
        this.root.remove();
    }

    // -- pictures

    private get shown(): Mode {
        return this.mode || this.natural;
    }

    /** Groups as soon as there are too many tasks, or too small ones to read; not back again while the graph grows. */
    private decide(width: number, height: number): void {
        const { store, scene } = this;
        if (this.mode || this.natural === "groups") {
            if (!store.nodes) this.natural = "tasks";
            return;
        }
        if (store.nodes <= LARGE && this.arranged !== store.structure) scene.arrange(store, "tasks", this.open);
        const fits = Math.min((width - 40) / Math.max(1, scene.width), (height - 40) / Math.max(1, scene.height));
        if (store.nodes > LARGE || (store.groups.length < store.nodes && fits < READABLE)) this.natural = "groups";
    }

    private frame(): void {
        this.pending = 0;
        const { canvas, scene, store } = this;
        const [width, height] = [canvas.clientWidth, canvas.clientHeight];
        if (!width || !height) return;
        this.decide(width, height);
        if (this.arranged !== store.structure || scene.mode !== this.shown) {
            const changedMode = scene.mode !== this.shown;
            scene.arrange(store, this.shown, this.open);
            this.arranged = store.structure;
            if (changedMode) this.moved = false;
            if (this.marks.chosen >= store.nodes) this.marks.chosen = -1;
        }
        this.keep();
        if (!this.moved) this.home(width, height);
        const density = window.devicePixelRatio || 1;
        if (canvas.width !== Math.round(width * density) || canvas.height !== Math.round(height * density)) {
            canvas.width = Math.round(width * density);
            canvas.height = Math.round(height * density);
        }
        const context = canvas.getContext("2d");
        if (!context) return;
        this.theme ??= this.readTheme();
        context.setTransform(density, 0, 0, density, 0, 0);
        paint(context, width, height, store, scene, this.camera, this.theme, this.marks);
        this.say();
    }

    private readTheme(): Theme {
        // The computed colour of an element, not of a variable: a canvas knows neither variables nor mixtures of colours.
        const probe = element("span", "", this.root);
        const of = (name: string) => {
            probe.style.color = `var(--nbray-${name})`;
            return getComputedStyle(probe).color;
        };
        const theme = {
            paper: of("paper"), ink: of("ink"), faint: of("faint"), accent: of("accent"),
            states: NAMES.map(of), font: getComputedStyle(this.root).fontFamily,
        };
        probe.remove();
        return theme;
    }

    private retheme(): void {
        this.theme = null;
        this.update();
    }

    private home(width: number, height: number): void {
        const { scene, camera } = this;
        const fits = Math.min((width - 40) / Math.max(1, scene.width), (height - 40) / Math.max(1, scene.height));
        camera.scale = Math.min(1, Math.max(fits, LEAST));
        camera.x = (scene.width - width / camera.scale) / 2;
        camera.y = (scene.height - height / camera.scale) / 2;
    }

    private fit(): void {
        this.moved = false;
        this.update();
    }

    // -- words

    private say(): void {
        const { store, counts } = this;
        const now = performance.now();
        const numbers = store.counts();
        const total = store.nodes.toLocaleString("en");
        const said = [`${total} task${store.nodes === 1 ? "" : "s"}`];
        counts.replaceChildren();
        element("span", "", counts).textContent = said[0];
        for (const state of ORDER) {
            if (!numbers[state]) continue;
            const text = `${numbers[state].toLocaleString("en")} ${STATES[state]}`;
            const count = element("span", "count", counts);
            count.dataset.glyph = GLYPHS[state];
            count.style.setProperty("--nbray-state", `var(--nbray-${NAMES[state]})`);
            count.textContent = text;
            said.push(text);
        }
        this.switch.textContent = this.shown === "tasks" ? "Groups" : "Tasks";
        this.switch.title = this.shown === "tasks" ? "One box per function and cell" : "One box per task";
        this.inspector.textContent = this.inspected();
        // A screen reader is told every few seconds, not ten times per second.
        if (now - this.told > 4000 || numbers[FINISHED] + numbers[FAILED] + numbers[CANCELLED] === store.nodes) {
            this.told = now;
            if (this.live.textContent !== said.join(", ")) {
                this.live.textContent = said.join(", ");
                this.remirror();
            }
        }
    }

    private remirror(): void {
        const rows = this.store.groups.slice(0, 100).map((group) => {
            const row = document.createElement("tr");
            const states = ORDER.filter((state) => group.counts[state]).map((state) => `${group.counts[state]} ${STATES[state]}`);
            for (const text of [group.name, group.title, states.join(", ")]) row.insertCell().textContent = text;
            return row;
        });
        this.mirror.replaceChildren(...rows);
    }

    private inspected(): string {
        const { store, marks } = this;
        const node = marks.hover >= 0 ? marks.hover : marks.hoverGroup >= 0 ? -1 : marks.chosen;
        if (node >= 0) {
            const group = store.groups[store.group[node]];
            const lines = [`${group.name}${group.title ? `  ${group.title}` : ""}`];
            const ran = store.ran(node);
            const error = store.errors.get(node);
            lines.push(`${GLYPHS[store.state[node]]} ${STATES[store.state[node]]}${error ? `: ${error}` : ""}${ran >= 0 ? `, ${duration(ran)}` : ""}`);
            if (store.attempt[node]) lines.push(`attempt ${store.attempt[node] + 1}`);
            return lines.join("\n");
        }
        const number = marks.hoverGroup >= 0 ? marks.hoverGroup : marks.chosenGroup;
        if (number < 0 || number >= store.groups.length) return "";
        const group = store.groups[number];
        const states = ORDER.filter((state) => group.counts[state]).map((state) => `${GLYPHS[state]} ${group.counts[state].toLocaleString("en")} ${STATES[state]}`);
        const failed = group.counts[FAILED] ? [...new Set(group.members.filter((each) => store.errors.has(each)).map((each) => store.errors.get(each)))] : [];
        return [`${group.name}${group.title ? `  ${group.title}` : ""}`, ...states, ...failed.slice(0, 3).map((each) => `  ${each}`), this.open.has(number) ? "" : "click: its tasks"].filter(Boolean).join("\n");
    }

    // -- what is looked for

    private refilter(): void {
        this.touched();
        this.update();
    }

    private keep(): void {
        const { store, marks } = this;
        const wanted = this.search.value.trim().toLowerCase();
        const filter = this.filter.value;
        if (!wanted && !filter) {
            marks.kept = marks.keptGroups = null;
            return;
        }
        const named = store.groups.map((group) => group.name.toLowerCase().includes(wanted));
        const slow = filter === "slow" ? this.slowest() : 0;
        const kept = new Uint8Array(store.nodes);
        const keptGroups = new Uint8Array(store.groups.length);
        for (let node = 0; node < store.nodes; node++) {
            const state = store.state[node];
            const fits = filter === "active" ? state <= RUNNING || state === RETRIED : filter === "failed" ? state === FAILED || state === RETRIED : filter === "slow" ? store.ran(node) >= slow : true;
            if (fits && named[store.group[node]]) kept[node] = keptGroups[store.group[node]] = 1;
        }
        [marks.kept, marks.keptGroups] = [kept, keptGroups];
    }

    /** Run time of the slowest twentieth. */
    private slowest(): number {
        const times = Float32Array.from({ length: this.store.nodes }, (_, node) => this.store.ran(node)).filter((each) => each >= 0).sort();
        return times.length ? Math.max(times[Math.floor(times.length * 0.95)], 1e-9) : 0;
    }

    // -- hands

    private listen(options: { signal: AbortSignal }): void {
        const { canvas, marks } = this;
        let from: { x: number; y: number; far: boolean } | null = null;
        canvas.addEventListener("pointerdown", (event) => {
            from = { x: event.clientX, y: event.clientY, far: false };
            canvas.setPointerCapture(event.pointerId);
        }, options);
        canvas.addEventListener("pointermove", (event) => {
            if (from) {
                const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
                if (from.far || Math.abs(dx) + Math.abs(dy) > 4) {
                    this.pan(-dx, -dy);
                    from = { x: event.clientX, y: event.clientY, far: true };
                }
                return;
            }
            const { node, group } = this.under(event);
            if (node === marks.hover && group === marks.hoverGroup) return;
            [marks.hover, marks.hoverGroup] = [node, group];
            canvas.style.cursor = node >= 0 || group >= 0 ? "pointer" : "grab";
            this.update();
        }, options);
        canvas.addEventListener("pointerup", (event) => {
            if (from && !from.far) this.choose(this.under(event), true);
            from = null;
        }, options);
        canvas.addEventListener("pointerleave", () => {
            [marks.hover, marks.hoverGroup] = [-1, -1];
            this.update();
        }, options);
        canvas.addEventListener("wheel", (event) => {
            // Only with the canvas in focus or a modifier: a wheel over it must not trap who scrolls through the notebook.
            if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return;
            event.preventDefault();
            const box = canvas.getBoundingClientRect();
            this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.clientX - box.left, event.clientY - box.top);
        }, { ...options, passive: false });
        canvas.addEventListener("keydown", (event) => {
            if (this.key(event.key, event.shiftKey)) {
                event.preventDefault();
                event.stopPropagation();
            }
        }, options);
    }

    private under(event: PointerEvent): { node: number; group: number } {
        const box = this.canvas.getBoundingClientRect();
        const { camera, scene, store } = this;
        return scene.at(store, (event.clientX - box.left) / camera.scale + camera.x, (event.clientY - box.top) / camera.scale + camera.y);
    }

    private pan(dx: number, dy: number): void {
        this.camera.x += dx / this.camera.scale;
        this.camera.y += dy / this.camera.scale;
        this.hold();
        this.moved = true;
        this.touched();
        this.update();
    }

    private zoom(factor: number, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2): void {
        const { camera } = this;
        const scale = Math.min(4, Math.max(LEAST, camera.scale * factor));
        camera.x += x / camera.scale - x / scale;
        camera.y += y / camera.scale - y / scale;
        camera.scale = scale;
        this.hold();
        this.moved = true;
        this.touched();
        this.update();
    }

    /** The middle of the view stays over the picture: nobody gets lost beside it. */
    private hold(): void {
        const { camera, scene, canvas } = this;
        const [wide, high] = [canvas.clientWidth / camera.scale, canvas.clientHeight / camera.scale];
        camera.x = Math.min(Math.max(camera.x, -wide / 2), scene.width - wide / 2);
        camera.y = Math.min(Math.max(camera.y, -high / 2), scene.height - high / 2);
    }

    private choose({ node, group }: { node: number; group: number }, act: boolean): void {
        const { marks } = this;
        this.touched();
        [marks.chosen, marks.chosenGroup] = [node, node >= 0 ? -1 : group];
        if (act && node < 0 && group >= 0) this.expand(group);
        this.update();
    }

    private expand(group: number): void {
        if (this.open.has(group)) this.open.delete(group);
        else this.open.add(group);
        this.arranged = -1;
        // The box that was opened stays where it is.
        this.moved = true;
        this.update();
    }

    private toggle(): void {
        this.mode = this.shown === "tasks" ? "groups" : "tasks";
        Object.assign(this.marks, { hover: -1, hoverGroup: -1, chosen: -1, chosenGroup: -1 });
        this.touched();
        this.update();
    }

    /** Whether a key was one of the view's. */
    private key(key: string, far: boolean): boolean {
        const { marks, store } = this;
        const step: Record<string, [number, number]> = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
        if (key in step) {
            const [dx, dy] = step[key];
            if (far) this.pan(60 * dx, 60 * dy);
            else this.walk(dx + dy);
        } else if (key === "+" || key === "=") this.zoom(1.25);
        else if (key === "-") this.zoom(0.8);
        else if (key === "0") this.fit();
        else if (key === "Enter" || key === " ") {
            if (marks.chosenGroup >= 0) this.expand(marks.chosenGroup);
        } else if (key === "Escape") this.choose({ node: -1, group: -1 }, false);
        else return false;
        this.live.textContent = this.inspected() || `${store.nodes} tasks`;
        return true;
    }

    /** To the next or previous task, or group, and bring it into sight. */
    private walk(by: number): void {
        const { marks, store, scene } = this;
        if (scene.mode === "groups" && marks.chosen < 0) {
            const count = store.groups.length;
            if (!count) return;
            this.choose({ node: -1, group: marks.chosenGroup < 0 ? 0 : (marks.chosenGroup + by + count) % count }, false);
            const box = scene.boxes[marks.chosenGroup];
            if (box) this.reveal(box.x, box.y, box.width, TASK.height);
        } else if (store.nodes) {
            const node = marks.chosen < 0 ? 0 : (marks.chosen + by + store.nodes) % store.nodes;
            this.choose({ node, group: -1 }, false);
            this.reveal(scene.x[node], scene.y[node], scene.nodeWidths[store.group[node]], scene.nodeHeights[store.group[node]]);
        }
    }

    private reveal(x: number, y: number, width: number, height: number): void {
        const { camera, canvas } = this;
        const [wide, high] = [canvas.clientWidth / camera.scale, canvas.clientHeight / camera.scale];
        if (x >= camera.x && x + width <= camera.x + wide && y >= camera.y && y + height <= camera.y + high) return;
        camera.x = x + width / 2 - wide / 2;
        camera.y = y + height / 2 - high / 2;
        this.moved = true;
        this.update();
    }
}
