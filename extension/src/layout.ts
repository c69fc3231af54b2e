/** The append-only layered layout of `nbray/state/layout.py`: nodes come one by one and never move. Pure. */

class Taken {
    private readonly up = new Map<number, number>();
    private readonly down = new Map<number, number>();

    /** The free row nearest to the wanted one, which is then taken. */
    takeNearest(wanted: number): number {
        const above = end(this.up, wanted);
        const below = end(this.down, wanted);
        const row = below < 0 || above - wanted <= wanted - below ? above : below;
        this.up.set(row, row + 1);
        this.down.set(row, row - 1);
        return row;
    }
}

/** Follows links to the first row that has none, and shortens the way for the next one. */
function end(links: Map<number, number>, start: number): number {
    let last = start;
    for (let next = links.get(last); next !== undefined; next = links.get(last)) last = next;
    while (start !== last) {
        const next = links.get(start) as number;
        links.set(start, last);
        start = next;
    }
    return last;
}

export class Layered {
    readonly columns: number[] = [];
    readonly rows: number[] = [];
    /** Per column, the largest row taken. */
    readonly heights: number[] = [];
    private readonly taken: Taken[] = [];

    /** Places the next node below its parents, nodes placed before, and returns its number. */
    place(parents: ArrayLike<number>): number {
        let column = 0;
        let total = 0;
        for (let i = 0; i < parents.length; i++) {
            column = Math.max(column, this.columns[parents[i]] + 1);
            total += this.rows[parents[i]];
        }
        const count = parents.length;
        const wanted = count ? Math.floor((2 * total + count) / (2 * count)) : 0;
        while (this.taken.length <= column) {
            this.taken.push(new Taken());
            this.heights.push(0);
        }
        const row = this.taken[column].takeNearest(wanted);
        this.columns.push(column);
        this.rows.push(row);
        this.heights[column] = Math.max(this.heights[column], row);
        return this.columns.length - 1;
    }
}
