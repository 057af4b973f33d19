// Which steps the charts show: the whole run, or a range that the controller tells in finer points.

import { byId, count, say } from "./dom.js";

const FEWEST = 8;

export class Zoom {
  /** `middle` tells the step around which to zoom in, or null; `onChange` has the curves asked for. */
  constructor(store, { middle, onChange }) {
    this.store = store;
    this.onChange = onChange;
    const scale = (factor) => {
      const [first, last] = this.range();
      const width = Math.max(FEWEST, Math.round((last - first + 1) * factor));
      const at = middle();
      const around = at !== null && at >= first && at <= last ? at : (first + last) / 2;
      this.show(Math.round(around - width / 2), width);
    };
    const move = (by) => {
      const [first, last] = this.range();
      const width = last - first + 1;
      this.show(first + by * Math.ceil(width / 2), width);
    };
    const actions = {
      "zoom-in": () => scale(0.5),
      "zoom-out": () => scale(2),
      "zoom-earlier": () => move(-1),
      "zoom-later": () => move(1),
      "zoom-whole": () => this.show(0, Infinity),
    };
    for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
  }

  range() {
    return this.store.range ?? [0, Math.max(0, this.store.newestStep)];
  }

  /** Show the steps from `first` on, so many; as far as there are any. */
  async show(first, width) {
    const { store } = this;
    const end = store.newestStep + 1;
    const begin = Math.max(0, Math.min(first, end - width));
    const range = width >= end ? null : [begin, begin + width - 1];
    if (String(range) === String(store.range)) return;
    store.range = range;
    await this.onChange();
    this.tell();
  }

  tell() {
    const { range, part } = this.store;
    const apart = part && part.width > 1 ? `, points ${part.width} steps apart` : "";
    say(byId("zoom-range"), range ? `steps ${count(range[0])} to ${count(range[1])}${apart}` : "the whole run");
  }
}
