// The alignment heat map: a cell for each two domains.

import { ask, byId, color, empty, make, number, say } from "./dom.js";

const UNKNOWN = -128;
const APART_MS = 4000;

export class Heat {
  constructor(domains) {
    this.domains = domains;
    this.step = -1;
    this.size = 0;
    this.cells = null;
    this.askedAt = -APART_MS;
    this.at = [0, 0];
    this.place = byId("heat");
    this.place.replaceChildren(empty("No step with gradients yet. Policies that need none have the trainers measure none."));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  async follow(step) {
    if (step < 0 || step === this.step || performance.now() - this.askedAt < APART_MS) return;
    this.askedAt = performance.now();
    const told = await ask("/api/alignment");
    if (told.step < 0) return;
    this.step = told.step;
    this.cells = Int8Array.from(atob(told.cells), (letter) => (letter.charCodeAt(0) << 24) >> 24);
    if (this.size !== told.size) this.build(told.size);
    this.draw();
  }

  build(size) {
    this.size = size;
    this.canvas = make("canvas", { width: size, height: size, tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "Heat map of the cosines between the domains' gradients. Arrow keys move through its cells, which are read out below.");
    this.caption = make("figcaption", { className: "muted" });
    this.caption.setAttribute("aria-live", "polite");
    const scale = make("div", { className: "scale muted" }, make("span", {}, "−1 against"), make("i"), make("span", {}, "+1 helps"));
    this.place.replaceChildren(make("figure", {}, this.canvas, scale, this.caption));
    const aim = (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.point(Math.floor(((event.clientY - box.top) / box.height) * size), Math.floor(((event.clientX - box.left) / box.width) * size));
    };
    this.canvas.addEventListener("pointermove", aim);
    this.canvas.addEventListener("pointerdown", aim);
    this.canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      this.point(this.at[0] + move[0], this.at[1] + move[1]);
    });
    say(this.caption, "Point at a cell, or focus the map and use the arrow keys.");
  }

  point(row, column) {
    const bound = (value) => Math.max(0, Math.min(this.size - 1, value));
    this.at = [bound(row), bound(column)];
    this.tell();
  }

  tell() {
    const [row, column] = this.at;
    const cell = this.cells[row * this.size + column];
    const value = cell === UNKNOWN ? "not measured" : number(cell / 127, 2);
    const name = (index) => make("bdi", {}, this.domains[index]);
    this.caption.replaceChildren(name(row), " with ", name(column), `: ${value}`);
  }

  draw() {
    if (!this.cells) return;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(this.size, this.size);
    const [cold, mid, hot] = ["--cold", "--mid", "--hot"].map((name) => rgb(color(name)));
    this.cells.forEach((cell, index) => {
      const value = cell === UNKNOWN ? 0 : Math.max(-1, cell / 127);
      const end = value < 0 ? cold : hot;
      // Small cosines are the usual ones: the root makes them visible.
      const share = Math.sqrt(Math.abs(value));
      for (let part = 0; part < 3; part += 1) image.data[4 * index + part] = mid[part] + share * (end[part] - mid[part]);
      image.data[4 * index + 3] = cell === UNKNOWN ? 0 : 255;
    });
    context.putImageData(image, 0, 0);
  }
}

function rgb(text) {
  const value = Number.parseInt(text.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}
