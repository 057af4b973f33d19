// What the page knows of the run: curves of the drawn domains, and all domains' newest point.

import { ask, unpack } from "./dom.js";

const KINDS = ["planned", "executed", "loss", "reward"];
const SCALARS = ["tokens_per_s", "data_wait_share", "decision_ms", "step_s"];
export const MOST_DRAWN = 9;

const plain = (values) => Array.from(values, (value) => (Number.isFinite(value) ? value : null));

const nothing = () => ({ first: 0, width: 1, length: 0, steps: [], curves: {}, scalars: {} });

/** Curves as the controller tells them: kind -> a list for each drawn domain, and the run's own. */
function curvesOf(told) {
  const { first, width, length } = told;
  return {
    first,
    width,
    length,
    steps: Array.from({ length }, (_, index) => first + index * width),
    curves: Object.fromEntries(KINDS.map((kind) => [kind, told[kind].map((text) => plain(unpack(text)))])),
    scalars: Object.fromEntries(SCALARS.map((name) => [name, plain(unpack(told[name]))])),
  };
}

export class Store {
  constructor(run) {
    this.run = run;
    this.size = run.domains.length;
    this.drawn = null; // numbers of domains, at most MOST_DRAWN
    this.epoch = -1;
    this.whole = nothing();
    this.part = null; // the same of the range that is looked at; null: the whole run is
    this.range = null; // [first, last] step of it
    this.newest = null; // kind -> all domains' values in the newest point
    this.losses = new Float32Array(this.size).fill(NaN); // newest known of all domains
    this.means = null; // [planned, executed] of all domains over the run
    this.newestStep = -1;
    this.heatStep = -1;
    this.fetching = null;
    this.wanted = false;
  }

  /** Take in a message of points; return whether the curves must be asked for anew. */
  take(told) {
    this.newestStep = told.step;
    this.heatStep = told.heat;
    if (told.means) {
      const both = unpack(told.means);
      this.means = [both.subarray(0, this.size), both.subarray(this.size)];
    }
    const points = told.points.map(([index, text]) => [index, unpack(text)]);
    for (const [, values] of points) this.newest = this.split(values);
    this.newest?.loss.forEach((loss, domain) => {
      if (Number.isFinite(loss)) this.losses[domain] = loss;
    });
    if (told.epoch !== this.epoch || told.gap || this.drawn === null) return told.length > 0;
    for (const [index, values] of points) this.put(index, values);
    return points.length > 0 && points[0][0] > this.whole.length;
  }

  split(values) {
    return Object.fromEntries(
      KINDS.map((kind, place) => [kind, values.subarray(place * this.size, (place + 1) * this.size)]),
    );
  }

  put(index, values) {
    const { whole } = this;
    while (whole.length <= index) {
      whole.steps.push(whole.length * whole.width);
      for (const kind of KINDS) for (const curve of whole.curves[kind]) curve.push(null);
      for (const name of SCALARS) whole.scalars[name].push(null);
      whole.length += 1;
    }
    const finite = (value) => (Number.isFinite(value) ? value : null);
    KINDS.forEach((kind, place) => {
      this.drawn.forEach((domain, at) => {
        whole.curves[kind][at][index] = finite(values[place * this.size + domain]);
      });
    });
    SCALARS.forEach((name, place) => {
      whole.scalars[name][index] = finite(values[KINDS.length * this.size + place]);
    });
  }

  /** Choose the domains with the greatest shares to be drawn. */
  choose() {
    const shares = this.means ? this.means[0] : this.newest.planned;
    const order = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]);
    this.drawn = order.slice(0, MOST_DRAWN);
  }

  /** Ask for the curves of the drawn domains; one question at a time, the last one counts. */
  async load() {
    this.wanted = true;
    if (this.fetching) return this.fetching;
    this.fetching = this.loadWanted();
    try {
      await this.fetching;
    } finally {
      this.fetching = null;
    }
    return undefined;
  }

  async loadWanted() {
    while (this.wanted) {
      this.wanted = false;
      if (this.drawn === null) this.choose();
      const asked = [...this.drawn];
      const { range } = this;
      const query = `/api/series?domains=${asked.join(",")}`;
      const told = await ask(query);
      const finer = range && (await ask(`${query}&first=${range[0]}&last=${range[1]}`));
      this.epoch = told.epoch;
      this.whole = curvesOf(told);
      this.part = finer && curvesOf(finer);
      if (asked.join() !== this.drawn.join() || range !== this.range) this.wanted = true;
    }
  }

  /** What the charts draw: the range that is looked at, or the whole run. */
  get shown() {
    return this.part ?? this.whole;
  }

  /** The drawn point that holds a step; null: there is none. */
  pointOf(step) {
    const { first, width, length } = this.shown;
    const index = Math.min(Math.floor((step - first) / width), length - 1);
    return index >= 0 ? index : null;
  }

  /** The upper end of the shares' axis: room for the drawn domains, and the others where they fit. */
  topOf(kind) {
    const { curves, length } = this.shown;
    let most = 0;
    for (let index = 0; index < length; index += 1) {
      let sum = 0;
      for (const curve of curves[kind]) sum += curve[index] ?? 0;
      most = Math.max(most, sum);
    }
    return most > 0.6 || most === 0 ? 1 : Math.min(1, Math.ceil(most * 1.25 * 20) / 20);
  }

  /** Cumulated shares for stacking, greatest sum first: the others on top, then the drawn ones. */
  stacked(kind) {
    const curves = this.shown.curves[kind];
    const sums = [];
    const running = new Array(this.shown.length).fill(0);
    for (const curve of curves) {
      sums.push(curve.map((value, index) => {
        if (value === null) return null;
        running[index] += value;
        return running[index];
      }));
    }
    const whole = curves.length ? curves[0].map((value) => (value === null ? null : 1)) : [];
    return [whole, ...sums.reverse()];
  }
}
