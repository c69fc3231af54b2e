/** The anywidget module: one store per widget, fed by its messages, shown by any number of views. */

import { decode } from "./frames.ts";
import { Store } from "./store.ts";
import { GraphView } from "./view.ts";

interface Model {
    get(name: string): unknown;
    on(event: string, callback: (message: Message, buffers: DataView[]) => void): void;
    off(event: string, callback?: (message: Message, buffers: DataView[]) => void): void;
    send(message: unknown): void;
}

interface Message {
    kind?: string;
}

interface State {
    store: Store;
    views: Set<GraphView>;
    asked: number;
}

/** Seconds between two signs of life: the kernel sends to nobody who gives none. */
const ALIVE = 5;
const states = new WeakMap<object, State>();

function stateOf(model: Model): State {
    let state = states.get(model);
    if (state) return state;
    state = { store: new Store(), views: new Set(), asked: 0 };
    states.set(model, state);
    const { store, views } = state;
    model.on("msg:custom", (message, buffers) => {
        if (message.kind !== "frames") return;
        for (const buffer of buffers) {
            if (store.apply(decode(buffer))) continue;
            const now = performance.now();
            if (now - state.asked > 1000) {
                state.asked = now;
                model.send({ kind: "whole" });
            }
            break;
        }
        for (const view of views) view.update();
    });
    return state;
}

export default {
    initialize({ model }: { model: Model }): void {
        stateOf(model);
    },
    render({ model, el }: { model: Model; el: HTMLElement }): () => void {
        const state = stateOf(model);
        let touched = 0;
        const view = new GraphView(el, state.store, String(model.get("title") ?? "Tasks"), () => {
            touched = performance.now();
        });
        state.views.add(view);
        model.send({ kind: "hello" });
        const timer = setInterval(() => {
            if (document.visibilityState === "hidden") return;
            model.send({ kind: "alive", touched: touched > performance.now() - 1000 * ALIVE });
        }, 1000 * ALIVE);
        return () => {
            clearInterval(timer);
            state.views.delete(view);
            view.remove();
            if (!state.views.size) model.send({ kind: "bye" });
        };
    },
};
