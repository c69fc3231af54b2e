// The store, the layout and the frames, against fixtures that Python has made (tests/widgets/made.py).
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { decode } from "../src/frames.ts";
import { Layered } from "../src/layout.ts";
import { Scene, wrapOf } from "../src/scene.ts";
import { FINISHED, Store } from "../src/store.ts";

const fixture = (name: string) => JSON.parse(readFileSync(new URL(`fixtures/${name}.json`, import.meta.url), "utf8"));
const bytes = (text: string) => new Uint8Array(Buffer.from(text, "base64"));

function told(name: string): { store: Store; expected: any } {
    const expected = fixture(name);
    const store = new Store();
    for (const frame of expected.frames) assert.equal(store.apply(decode(bytes(frame))), true);
    return { store, expected };
}

for (const name of ["pipeline", "drawn"]) {
    test(`${name}: the store knows what Python knows`, () => {
        const { store, expected } = told(name);
        assert.equal(store.nodes, expected.nodes);
        assert.deepEqual([...store.state.slice(0, store.nodes)], expected.states);
        assert.deepEqual([...store.attempt.slice(0, store.nodes)], expected.attempts);
        assert.deepEqual([...store.kind.slice(0, store.nodes)], expected.kinds);
        assert.deepEqual([...store.group.slice(0, store.nodes)], expected.group_of);
        assert.deepEqual(store.groups.map((g) => [g.name, g.title, g.actor, g.counts]), expected.groups);
        const edges = Array.from({ length: store.edges }, (_, e) => [store.source[e], store.target[e], store.edgeKind[e]]);
        assert.deepEqual(edges, expected.edges);
        const between = [...store.groupEdges.values()].map((e) => [e.source, e.target, e.kind, e.count]);
        assert.deepEqual(between.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]), expected.group_edges);
        assert.deepEqual(Object.fromEntries([...store.errors].map(([node, error]) => [String(node), error])), expected.errors);
        assert.deepEqual(store.counts(), expected.groups.reduce((sum: number[], g: any) => sum.map((n, i) => n + g[3][i]), store.counts().map(() => 0)));
    });
    test(`${name}: the layout is Python's`, () => {
        const { store, expected } = told(name);
        assert.deepEqual(store.layout.columns, expected.columns);
        assert.deepEqual(store.layout.rows, expected.rows);
    });
    test(`${name}: nothing overlaps on the picture, and edges lead forward`, () => {
        const { store } = told(name);
        const scene = new Scene();
        for (const open of [new Set<number>(), new Set(store.groups.keys())]) {
            for (const mode of ["tasks", "groups"] as const) {
                scene.arrange(store, mode, open);
                const seen = new Set<string>();
                for (let node = 0; node < store.nodes; node++) {
                    if (Number.isNaN(scene.x[node])) continue;
                    seen.add(`${scene.x[node]} ${scene.y[node]}`);
                    const of = store.group[node];
                    assert.ok(scene.x[node] + scene.nodeWidths[of] <= scene.width && scene.y[node] + scene.nodeHeights[of] <= scene.height);
                }
                assert.equal(seen.size, mode === "tasks" || open.size ? store.nodes : 0);
                if (mode === "tasks") {
                    for (let e = 0; e < store.edges; e++) assert.ok(scene.x[store.source[e]] < scene.x[store.target[e]]);
                }
                for (const [i, a] of scene.boxes.entries()) {
                    for (const b of scene.boxes.slice(i + 1)) {
                        assert.ok(a.x + a.width <= b.x || b.x + b.width <= a.x || a.y + a.height <= b.y || b.y + b.height <= a.y);
                    }
                }
            }
        }
    });
}

test("a missing frame is noticed, one that comes twice is passed over, a reset heals", () => {
    const { frames } = fixture("drawn");
    const store = new Store();
    assert.ok(frames.length > 3);
    assert.equal(store.apply(decode(bytes(frames[1]))), false);
    assert.equal(store.apply(decode(bytes(frames[0]))), true);
    assert.equal(store.apply(decode(bytes(frames[2]))), false);
    assert.equal(store.apply(decode(bytes(frames[1]))), true);
    const nodes = store.nodes;
    assert.equal(store.apply(decode(bytes(frames[1]))), true);
    assert.equal(store.nodes, nodes);
    assert.equal(store.apply(decode(bytes(frames[0]))), true);
    assert.equal(store.apply(decode(bytes(frames[1]))), true);
    assert.equal(store.nodes, nodes);
});

test("frames that lie anywhere in a message can be read, torn ones cannot", () => {
    const frame = bytes(fixture("pipeline").frames[0]);
    const moved = new Uint8Array(frame.length + 3);
    moved.set(frame, 3);
    assert.deepEqual(decode(new DataView(moved.buffer, 3)), decode(frame));
    for (const length of [0, 20, 48, frame.length - 1]) assert.throws(() => decode(frame.slice(0, length)), RangeError);
    assert.throws(() => decode(new Uint8Array(64)), RangeError);
    const longer = new Uint8Array(frame.length + 1);
    longer.set(frame);
    assert.throws(() => decode(longer), RangeError);
});

test("what lies under a point", () => {
    const { store } = told("pipeline");
    const scene = new Scene();
    scene.arrange(store, "tasks", new Set());
    for (let node = 0; node < store.nodes; node++) {
        assert.deepEqual(scene.at(store, scene.x[node] + 5, scene.y[node] + 5), { node, group: -1 });
    }
    scene.arrange(store, "groups", new Set([0]));
    const first = store.groups[0].members[0];
    assert.deepEqual(scene.at(store, scene.x[first] + 1, scene.y[first] + 1), { node: first, group: 0 });
    assert.deepEqual(scene.at(store, scene.boxes[1].x + 1, scene.boxes[1].y + 1), { node: -1, group: 1 });
    assert.deepEqual(scene.at(store, -50, -50), { node: -1, group: -1 });
});

test("run times: of what has ended, of what runs until now, of nothing else", () => {
    const { store, expected } = told("pipeline");
    const over = expected.states.indexOf(FINISHED);
    assert.equal(store.ran(over), 1.5);
    const begun = new Store();
    begun.apply(decode(bytes(expected.frames[0])));
    assert.equal(begun.ran(0), begun.now - begun.started[0]);
    assert.equal(begun.ran(6), -1);
});

test("many children of one task are no quadratic work, and wrap beside each other", () => {
    const layout = new Layered();
    layout.place([]);
    const began = performance.now();
    for (let child = 0; child < 100_000; child++) layout.place([0]);
    assert.ok(performance.now() - began < 5000);
    assert.equal(new Set(layout.rows.slice(1)).size, 100_000);
    assert.equal(layout.heights[1], 99_999);
    assert.deepEqual([10, 1000, 1001, 99_999].map(wrapOf), [40, 40, 80, 640]);
});
