"use strict";
// The page reads without this script. It adds the values under the pointer, and the slider over time.

function dataOf(figure) {
  return JSON.parse(figure.querySelector(":scope > script").textContent);
}

function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const { x: [first, last], lines } = dataOf(figure);
  const area = figure.querySelector(".area");
  const values = [...figure.querySelectorAll(".legend output")];
  const ends = values.map((value) => value.textContent);
  const cursor = document.createElement("div");
  const at = document.createElement("span");
  cursor.className = "cursor";
  cursor.append(at);

  const show = (event) => {
    const box = area.getBoundingClientRect();
    const wanted = first + ((event.clientX - box.left) / box.width) * (last - first);
    // The cursor stands at a step that was logged, that of the line with most points.
    const densest = lines.reduce((a, b) => (b.length > a.length ? b : a));
    const step = nearest(densest, wanted)[0];
    const place = (step - first) / (last - first);
    cursor.style.left = `${100 * place}%`;
    at.className = place > 0.5 ? "at left" : "at";
    at.textContent = `step ${step.toLocaleString("en")}`;
    lines.forEach((points, index) => { values[index].textContent = nearest(points, step)[1]; });
    area.append(cursor);
  };
  const hide = () => {
    cursor.remove();
    values.forEach((value, index) => { value.textContent = ends[index]; });
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", hide);
}

function numbersOf(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return Array.from({ length: bytes.length / 2 }, (_, index) => bytes[2 * index] + 256 * bytes[2 * index + 1]);
}

for (const figure of document.querySelectorAll("figure.heatmap")) {
  const { frames, labels, experts } = dataOf(figure);
  const area = figure.querySelector(".area");
  const picture = area.querySelector("img");
  const readout = figure.querySelector(".readout");
  const time = figure.querySelector(".time");
  const mark = document.createElement("div");
  mark.className = "cell";
  let frame = frames[frames.length - 1];
  let cell = null;

  const tell = () => {
    const words = [`step ${frame.step.toLocaleString("en")}`];
    if (cell) {
      const load = numbersOf(frame.load)[cell.row * experts + cell.column];
      words.unshift(`layer ${labels[cell.row]}, expert ${cell.column}: ` + (load === 0xffff ? "none" : `${(load / 100).toFixed(2)}×`));
    }
    readout.textContent = words.join(" at ");
  };
  const point = (event) => {
    const box = area.getBoundingClientRect();
    const place = (at, start, length, cells) => Math.min(cells - 1, Math.max(0, Math.floor(((at - start) / length) * cells)));
    cell = {
      row: place(event.clientY, box.top, box.height, labels.length),
      column: place(event.clientX, box.left, box.width, experts),
    };
    const [height, width] = [100 / labels.length, 100 / experts];
    mark.style.cssText = `left:${cell.column * width}%;top:${cell.row * height}%;width:${width}%;height:${height}%`;
    area.append(mark);
    tell();
  };
  const choose = (index) => {
    frame = frames[index];
    picture.src = frame.image;
    picture.alt = `Load at step ${frame.step}`;
    tell();
  };
  area.addEventListener("pointermove", point);
  area.addEventListener("pointerdown", point);
  area.addEventListener("pointerleave", () => { cell = null; mark.remove(); tell(); });
  if (time) {
    const slider = time.querySelector("input");
    time.hidden = false;
    slider.addEventListener("input", () => choose(Number(slider.value)));
    for (const small of figure.querySelectorAll(".strip figure")) {
      small.style.cursor = "pointer";
      small.addEventListener("click", () => {
        slider.value = frames.findIndex((other) => other.step === Number(small.dataset.step));
        choose(Number(slider.value));
      });
    }
  }
}
