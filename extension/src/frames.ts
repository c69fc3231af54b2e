/** Reads the frames that `nbray/widgets/frames.py` writes; the format is described there. Pure. */

const MAGIC = 0x3147424e;
const HEADER = 48;

export interface Words {
    groups?: [name: string, title: string, actor: number][];
    errors?: Record<string, string>;
}

export interface Frame {
    reset: boolean;
    sequence: number;
    firstNode: number;
    firstEdge: number;
    now: number;
    groups: Uint32Array;
    kinds: Uint8Array;
    sources: Uint32Array;
    targets: Uint32Array;
    edgeKinds: Uint8Array;
    changed: Uint32Array;
    started: Float32Array;
    seconds: Float32Array;
    states: Uint8Array;
    attempts: Uint8Array;
    words: Words;
}

/** Throws a RangeError for what is no whole frame. */
export function decode(data: ArrayBufferView | ArrayBuffer): Frame {
    // Jupyter's buffers lie anywhere in a message: a copy is aligned.
    const bytes = ArrayBuffer.isView(data)
        ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice()
        : new Uint8Array(data.slice(0));
    const buffer = bytes.buffer;
    if (bytes.length < HEADER) throw new RangeError(`a frame of ${bytes.length} bytes`);
    const [magic, flags, sequence, firstNode, nodes, firstEdge, edges, changes, text] = new Uint32Array(buffer, 0, 10);
    if (magic !== MAGIC) throw new RangeError("not a frame of nbray");
    let at = HEADER;
    const take = (bytesEach: number, count: number): number => {
        const from = at;
        at += bytesEach * count;
        if (at > bytes.length) throw new RangeError(`a frame of ${bytes.length} bytes ends before its contents`);
        return from;
    };
    const words32 = (count: number) => new Uint32Array(buffer, take(4, count), count);
    const floats = (count: number) => new Float32Array(buffer, take(4, count), count);
    const small = (count: number) => new Uint8Array(buffer, take(1, count), count);
    const frame = {
        reset: (flags & 1) === 1,
        sequence,
        firstNode,
        firstEdge,
        now: new Float64Array(buffer, 40, 1)[0],
        groups: words32(nodes),
        sources: words32(edges),
        targets: words32(edges),
        changed: words32(changes),
        started: floats(changes),
        seconds: floats(changes),
        kinds: small(nodes),
        edgeKinds: small(edges),
        states: small(changes),
        attempts: small(changes),
    };
    const said = small(text);
    if (at !== bytes.length) throw new RangeError(`a frame of ${bytes.length} bytes with contents of ${at}`);
    return { ...frame, words: text ? (JSON.parse(new TextDecoder().decode(said)) as Words) : {} };
}
