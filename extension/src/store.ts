/** What a view knows of a graph: columns of numbers, as in `nbray/state/graph.py`, kept up to date by frames. No DOM. */

import type { Frame } from "./frames.ts";
import { Layered } from "./layout.ts";

export const STATES = ["waiting for inputs", "queued", "sent to a worker", "running", "finished", "failed", "cancelled", "to be tried again"];
export const [WAITING, QUEUED, SENT, RUNNING, FINISHED, FAILED, CANCELLED, RETRIED] = [0, 1, 2, 3, 4, 5, 6, 7];
/** In which order states are drawn and told side by side: what needs a look comes first. */
export const ORDER = [FAILED, RETRIED, RUNNING, SENT, QUEUED, WAITING, CANCELLED, FINISHED];

type Numbers = Uint8Array | Uint32Array | Float32Array;

/** A typed array that grows by doubling. */
class Column<T extends Numbers> {
    data: T;
    private readonly kind: new (size: number) => T;

    constructor(kind: new (size: number) => T) {
        this.kind = kind;
        this.data = new kind(256);
    }

    append(from: number, values: ArrayLike<number>): void {
        this.reserve(from + values.length);
        this.data.set(values, from);
    }

    reserve(size: number): void {
        if (size <= this.data.length) return;
        const larger = new this.kind(Math.max(size, 2 * this.data.length));
        larger.set(this.data);
        this.data = larger;
    }
}

export interface Group {
    name: string;
    title: string;
    actor: boolean;
    counts: number[];
    members: number[];
}

export interface GroupEdge {
    source: number;
    target: number;
    kind: number;
    count: number;
}

export class Store {
    nodes = 0;
    edges = 0;
    now = 0;
    sequence = -1;
    /** Counts up with every change of nodes, edges or groups. */
    structure = 0;
    groups: Group[] = [];
    groupEdges = new Map<string, GroupEdge>();
    errors = new Map<number, string>();
    layout = new Layered();
    groupLayout = new Layered();
    private readonly columns = {
        group: new Column(Uint32Array),
        kind: new Column(Uint8Array),
        state: new Column(Uint8Array),
        attempt: new Column(Uint8Array),
        started: new Column(Float32Array),
        seconds: new Column(Float32Array),
        source: new Column(Uint32Array),
        target: new Column(Uint32Array),
        edgeKind: new Column(Uint8Array),
    };

    get group(): Uint32Array { return this.columns.group.data; }
    get kind(): Uint8Array { return this.columns.kind.data; }
    get state(): Uint8Array { return this.columns.state.data; }
    get attempt(): Uint8Array { return this.columns.attempt.data; }
    get started(): Float32Array { return this.columns.started.data; }
    get seconds(): Float32Array { return this.columns.seconds.data; }
    get source(): Uint32Array { return this.columns.source.data; }
    get target(): Uint32Array { return this.columns.target.data; }
    get edgeKind(): Uint8Array { return this.columns.edgeKind.data; }

    /** Takes a frame in. False: frames before it are missing, and the whole must be asked for; a frame seen before is passed over. */
    apply(frame: Frame): boolean {
        if (frame.reset) this.clear();
        else if (this.sequence >= 0 && frame.sequence <= this.sequence) return true;
        else if (frame.sequence !== this.sequence + 1 || frame.firstNode !== this.nodes || frame.firstEdge !== this.edges) return false;
        this.sequence = frame.sequence;
        this.now = frame.now;
        for (const [name, title, actor] of frame.words.groups ?? []) {
            this.groups.push({ name, title, actor: actor === 1, counts: STATES.map(() => 0), members: [] });
            this.structure++;
        }
        if (frame.groups.length || frame.sources.length) this.grow(frame);
        this.change(frame);
        return true;
    }

    counts(): number[] {
        return STATES.map((_, state) => this.groups.reduce((sum, group) => sum + group.counts[state], 0));
    }

    /** Seconds that a node has run, -1 if it has not started. */
    ran(node: number): number {
        if (this.seconds[node] >= 0) return this.seconds[node];
        return this.started[node] >= 0 && this.state[node] === RUNNING ? Math.max(0, this.now - this.started[node]) : -1;
    }

    private clear(): void {
        this.nodes = this.edges = 0;
        this.groups = [];
        this.groupEdges.clear();
        this.errors.clear();
        this.layout = new Layered();
        this.groupLayout = new Layered();
        this.structure++;
    }

    private grow(frame: Frame): void {
        const { columns } = this;
        const first = this.nodes;
        columns.group.append(first, frame.groups);
        columns.kind.append(first, frame.kinds);
        this.nodes += frame.groups.length;
        for (const column of [columns.state, columns.attempt]) column.reserve(this.nodes);
        for (const column of [columns.started, columns.seconds]) column.reserve(this.nodes);
        columns.state.data.fill(0, first, this.nodes);
        columns.source.append(this.edges, frame.sources);
        columns.target.append(this.edges, frame.targets);
        columns.edgeKind.append(this.edges, frame.edgeKinds);
        this.edges += frame.sources.length;
        this.structure++;
        let at = 0;
        const parents: number[] = [];
        const groupParents: number[] = [];
        for (let node = first; node < this.nodes; node++) {
            const group = this.group[node];
            parents.length = groupParents.length = 0;
            for (; at < frame.targets.length && frame.targets[at] === node; at++) {
                const source = frame.sources[at];
                parents.push(source);
                const other = this.group[source];
                if (other === group) continue;
                groupParents.push(other);
                const key = `${other} ${group} ${frame.edgeKinds[at]}`;
                const known = this.groupEdges.get(key);
                if (known) known.count++;
                else this.groupEdges.set(key, { source: other, target: group, kind: frame.edgeKinds[at], count: 1 });
            }
            this.layout.place(parents);
            const { members, counts } = this.groups[group];
            members.push(node);
            counts[0]++;
            // A group takes its place when its first task comes; what its later tasks depend on does not move it.
            if (group === this.groupLayout.columns.length) this.groupLayout.place(groupParents);
        }
    }

    private change(frame: Frame): void {
        const { group, state, attempt, started, seconds } = this;
        for (let i = 0; i < frame.changed.length; i++) {
            const node = frame.changed[i];
            const counts = this.groups[group[node]].counts;
            counts[state[node]]--;
            counts[frame.states[i]]++;
            state[node] = frame.states[i];
            attempt[node] = frame.attempts[i];
            started[node] = frame.started[i];
            seconds[node] = frame.seconds[i];
            if (this.errors.size) this.errors.delete(node);
        }
        for (const [node, error] of Object.entries(frame.words.errors ?? {})) this.errors.set(Number(node), error);
    }
}
