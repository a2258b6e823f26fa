// The page of desra review. All canvases show one window of the image; the server keeps all answers.
"use strict";

const TILE = 512, CONTEXT = 1.4, SMALLEST = 192, KEPT = 600, RETRY = 3000;
const TITLES = {gan_sr: "GAN-SR", mse_sr: "MSE-SR"};
const find = (query) => document.querySelector(query);
const large = find("#large canvas"), small = [...document.querySelectorAll("#small canvas")];

let now = null;  // the state that the server has sent last
let view = {x: 0, y: 0, scale: 1};  // the centre of the window, in pixels of the image, and its scale in the large canvas
let flipped = false, outlined = true, tool = "hand", radius = 8;
let busy = false, covered = false, timer = 0;
let lacking = null;  // why the GAN picture of the window cannot be shown
let stroke = null, pointer = null, dragged = null, sending = Promise.resolve();
const tiles = new Map();  // by address: {bitmap, error}; both missing while it is being loaded

const keyOf = (place) => place && JSON.stringify([place.id, place.box]);
const rating = () => now.seconds !== null;

// Tiles

function tile(place, kind, level, column, row) {
  let address = `tiles/${place.id}/${kind}/${level}/${column}/${row}`;
  if (kind === "mask" || kind === "outline") address += `?box=${JSON.stringify(place.box)}&answers=${now.answers}`;
  if (!tiles.has(address)) {
    tiles.set(address, {});
    load(address);
    for (const old of tiles.keys()) {
      if (tiles.size <= KEPT) break;
      tiles.get(old).bitmap?.close();
      tiles.delete(old);
    }
  }
  return tiles.get(address);
}

async function load(address) {
  const entry = tiles.get(address);
  try {
    const answer = await fetch(address);
    if (answer.ok) entry.bitmap = await createImageBitmap(await answer.blob(), {colorSpaceConversion: "none"});
    else entry.error = (await answer.json()).error;
  } catch {
    entry.error = "desra review does not answer any more";
  }
  if (entry.error) setTimeout(() => {
    if (tiles.get(address) === entry) tiles.delete(address);  // what has failed is asked for again
    draw();
  }, RETRY);
  draw();
}

// The window of a canvas: the scale in it, and where the image's origin lies in it, in pixels of the canvas.
function windowOf(canvas, seen = view) {
  const scale = seen.scale * canvas.width / large.width;
  return {scale, left: Math.round(canvas.width / 2 - seen.x * scale), top: Math.round(canvas.height / 2 - seen.y * scale)};
}

// Call a function for each tile of a kind in a window.
function each(canvas, place, kind, seen, use) {
  const {scale, left, top} = windowOf(canvas, seen);
  const level = Math.max(0, Math.min(12, Math.floor(Math.log2(1 / scale))));
  const side = TILE * 2 ** level;
  const first = [Math.max(0, Math.floor(-left / scale / side)), Math.max(0, Math.floor(-top / scale / side))];
  const last = [Math.min(place.width, (canvas.width - left) / scale), Math.min(place.height, (canvas.height - top) / scale)];
  for (let row = first[1]; row * side < last[1]; row++) {
    for (let column = first[0]; column * side < last[0]; column++) {
      const x = column * side, y = row * side;
      const width = Math.min(side, place.width - x), height = Math.min(side, place.height - y);
      use(tile(place, kind, level, column, row), left + x * scale, top + y * scale, width * scale, height * scale);
    }
  }
}

function paint(canvas, kind) {
  const context = canvas.getContext("2d"), place = now.place;
  if (place.lacks[kind]) return place.lacks[kind];
  context.imageSmoothingEnabled = windowOf(canvas).scale < 1;
  let error = null;
  each(canvas, place, kind, view, (tile, x, y, width, height) => {
    error ??= tile.error ?? null;
    if (!tile.bitmap) return;
    const left = Math.round(x), top = Math.round(y);
    context.drawImage(tile.bitmap, left, top, Math.round(x + width) - left, Math.round(y + height) - top);
  });
  return error;
}

// Drawing

let asked = false;
function draw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; if (now) drawAll(); });
}

function fitCanvas(canvas) {
  const width = Math.round(canvas.clientWidth * devicePixelRatio), height = Math.round(canvas.clientHeight * devicePixelRatio);
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").clearRect(0, 0, width, height);
}

function drawAll() {
  for (const canvas of [large, ...small]) fitCanvas(canvas);
  document.body.dataset.ready = "";
  if (!now.place) return;
  const kind = flipped && !rating() ? "mse_sr" : "gan_sr";
  const wrong = paint(large, kind);
  let whole = true;
  lacking = null;
  each(large, now.place, "gan_sr", view, (tile) => { whole &&= Boolean(tile.bitmap); lacking ??= tile.error ?? null; });
  const error = lacking ? `${lacking}; N goes on without an answer` : wrong;
  find("#shown").textContent = TITLES[kind];
  find("#scale").textContent = `${Math.round(view.scale * 100)} %`;
  find("#tool").textContent = error ?? (tool === "hand" ? "" : `${tool}, ${2 * radius + 1} px`);
  if (!rating()) {
    if (outlined) paint(large, "outline");
    drawStroke();
    for (const canvas of small) {
      canvas.parentElement.querySelector("i").textContent = paint(canvas, canvas.dataset.kind) ?? "";
    }
  }
  if (whole) ready();
}

function drawStroke() {
  const context = large.getContext("2d"), {scale, left, top} = windowOf(large);
  const at = ([x, y]) => [left + (x + 0.5) * scale, top + (y + 0.5) * scale];
  if (stroke) {
    context.strokeStyle = stroke.erase ? "#ffffff88" : "#ff40c888";
    context.lineWidth = (2 * stroke.radius + 1) * scale;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...at(stroke.points[0]));
    for (const point of stroke.points) context.lineTo(...at(point));
    context.stroke();
  }
  if (pointer && tool !== "hand") {
    context.strokeStyle = "#fff";
    context.lineWidth = 1;
    context.beginPath();
    context.arc(...at(pointer), (radius + 0.5) * scale, 0, 7);
    context.stroke();
  }
}

// Once the picture of a place is there, the place can be answered, and that of the next is loaded.
function ready() {
  const key = keyOf(now.place);
  document.body.dataset.ready = key;
  const next = now.following;
  if (next) {
    const seen = regionView(next);
    for (const kind of rating() ? ["gan_sr"] : ["gan_sr", "mse_sr"]) each(large, next, kind, seen, () => {});
  }
  if (rating() && !timer && !covered) timer = setTimeout(cover, now.seconds * 1000);
}

function cover() {
  covered = true;
  timer = 0;
  find("#large").classList.add("covered");
  find("#question").hidden = false;
}

function regionView(place) {
  const [x, y, width, height] = place.box ?? [0, 0, place.width, place.height];
  const side = place.box ? Math.max(SMALLEST, CONTEXT * Math.max(width, height)) : Math.max(width, height);
  let scale = Math.min(large.width / (place.box ? side : width), large.height / (place.box ? side : height), 8);
  if (scale > 1) scale = Math.floor(scale);
  // The window lies in the image, where that is as large.
  const inside = (centre, half, length) => 2 * half > length ? length / 2 : Math.min(Math.max(centre, half), length - half);
  return {
    x: inside(x + width / 2, large.width / 2 / scale, place.width),
    y: inside(y + height / 2, large.height / 2 / scale, place.height),
    scale,
  };
}

// State

function show(state, said = "") {
  const changed = !now || keyOf(now.place) !== keyOf(state.place);
  now = {...now, ...state};  // the response to an answer does not have all of it
  document.body.classList.toggle("rate", rating());
  find("#rate").hidden = !rating();
  if (changed) {
    document.body.dataset.ready = "";
    clearTimeout(timer);
    timer = 0;
    covered = flipped = false;
    lacking = null;
    setTool("hand");
    stroke = null;
    find("#large").classList.remove("covered");
    find("#question").hidden = true;
    for (const canvas of [large, ...small]) fitCanvas(canvas);
    if (now.place) view = regionView(now.place);
  }
  const {answered, left, all} = now.counts;
  find("#progress").textContent = `${now.rater}: ${answered} answered, ${left} left, of ${all}`;
  const {regions, raters, share, kappa} = now.agreement;
  find("#agreement").textContent = !regions ? "" :
    `${raters} raters agree on ${Math.round(share * 100)} % of ${regions} shared, ` +
    (kappa === null ? "kappa undefined" : `kappa ${kappa.toFixed(2)}`);
  const {images, waiting, why, failed} = now.imported;
  const problem = why ?? failed[0];
  find("#imported").textContent = rating() ? "" :
    `human masks: ${images}` + (problem ? `; ${problem}` : waiting ? `, checking ${waiting}` : "");
  find("#imported").classList.toggle("waits", Boolean(problem));
  find("#end").hidden = Boolean(now.place);
  find("#end").textContent = "Nothing is left to answer.\nCtrl-C in the terminal ends the review; Z takes the last answer back.";
  const place = now.place;
  find("#about").textContent = !place ? "" : [place.name, place.box && !rating() && `${place.box[2]}×${place.box[3]} px`,
    place.severity !== undefined && `severity ${place.severity.toFixed(1)}`,
    place.mean_similarity !== undefined && `similarity ${place.mean_similarity.toFixed(3)}`, place.class,
    !place.box && "no region found here: C if that is right, or draw what is missing, then A"].filter(Boolean).join("  ·  ");
  find("#said").textContent = said;
  document.body.dataset.state = now.state;
  draw();
}

async function send(action, body = {}) {
  busy = true;
  try {
    const given = {state: now.state, key: now.place && [now.place.id, now.place.box], ...body};
    const answer = await fetch(action, {method: "POST", body: JSON.stringify(given)});
    const found = await answer.json();
    if (answer.ok) show(found, found.said);
    else if (found.now) show(found.now, found.error);
    else show(now, found.error);
  } catch {
    find("#said").textContent = "desra review does not answer any more: start it again; this answer was not taken";
  }
  busy = false;
}

function setTool(name) {
  tool = name;
  find("#large").classList.toggle("brush", tool !== "hand");
  for (const [key, of] of [["b", "brush"], ["e", "eraser"], ["h", "hand"]]) {
    find(`#decide [data-key="${key}"]`).classList.toggle("on", tool === of);
  }
}

// Keys and mouse

function zoom(factor, x = large.width / 2, y = large.height / 2) {
  const {scale, left, top} = windowOf(large);
  const at = [(x - left) / scale, (y - top) / scale];
  const before = view.scale;
  view.scale = Math.min(32, Math.max(1 / 64, before * factor));
  if ((before - 1) * (view.scale - 1) < 0) view.scale = 1;
  if (view.scale > 1) view.scale = Math.round(view.scale);  // each pixel as large as the others
  view.x = at[0] - (x - large.width / 2) / view.scale;
  view.y = at[1] - (y - large.height / 2) / view.scale;
}

const pan = (x, y) => { view.x += x * large.width / 8 / view.scale; view.y += y * large.height / 8 / view.scale; };
const ANSWERS = {a: "accept", r: "reject", u: "unsure", c: "clean"}, RATINGS = {y: "yes", n: "no"};
const LOOKS = {
  f: () => { flipped = !flipped; }, " ": () => { flipped = !flipped; }, m: () => { outlined = !outlined; },
  b: () => setTool("brush"), e: () => setTool("eraser"), h: () => setTool("hand"),
  "[": () => { radius = Math.max(0, radius - Math.max(1, radius >> 2)); },
  "]": () => { radius = Math.min(500, radius + Math.max(1, radius >> 2)); },
  "+": () => zoom(2), "=": () => zoom(2), "-": () => zoom(0.5),
  0: () => { view = regionView(now.place); }, 9: () => { view = regionView({...now.place, box: null}); },
  arrowleft: () => pan(-1, 0), arrowright: () => pan(1, 0), arrowup: () => pan(0, -1), arrowdown: () => pan(0, 1),
};

function press(key) {
  if (!now) return false;
  if (key === "z") {
    if (!busy && !stroke) send("undo");
    return true;
  }
  if (!now.place) return false;
  const answers = rating() ? RATINGS : ANSWERS;
  if (answers[key] || (key === "n" && !rating())) {
    if (busy || stroke) return true;
    // Nobody can answer what is not shown.
    const shown = document.body.dataset.ready === keyOf(now.place);
    if (shown && answers[key]) send("answer", {answer: answers[key]});
    else if (key === "n" && (shown || lacking)) send("next");
    return true;
  }
  if (rating() || !LOOKS[key]) return false;
  LOOKS[key]();
  draw();
  return true;
}

addEventListener("keydown", (event) => {
  if (event.altKey || event.metaKey || (event.ctrlKey && event.key !== "z")) return;
  if (event.repeat && !event.key.startsWith("Arrow")) return event.preventDefault();
  if (event.key === " " && event.target.tagName === "BUTTON") event.target.blur();
  if (press(event.key.toLowerCase())) event.preventDefault();
});

for (const button of document.querySelectorAll("button")) {
  button.addEventListener("click", () => { button.blur(); press(button.dataset.key); });
}

function pixelAt(event) {
  const box = large.getBoundingClientRect(), {scale, left, top} = windowOf(large);
  const x = (event.clientX - box.left) * large.width / box.width, y = (event.clientY - box.top) * large.height / box.height;
  return [Math.floor((x - left) / scale), Math.floor((y - top) / scale)];
}

large.addEventListener("pointerdown", (event) => {
  if (!now?.place || rating() || event.button) return;
  large.setPointerCapture(event.pointerId);
  if (tool === "hand") dragged = {x: event.clientX, y: event.clientY, view: {...view}};
  else stroke = {points: [pixelAt(event)], erase: tool === "eraser", radius, key: [now.place.id, now.place.box]};
  draw();
});
large.addEventListener("pointermove", (event) => {
  if (!now?.place || rating()) return;
  pointer = pixelAt(event);
  if (dragged) {
    view.x = dragged.view.x - (event.clientX - dragged.x) * devicePixelRatio / view.scale;
    view.y = dragged.view.y - (event.clientY - dragged.y) * devicePixelRatio / view.scale;
  } else if (stroke) {
    for (const part of event.getCoalescedEvents?.() ?? [event]) {
      const point = pixelAt(part), last = stroke.points.at(-1);
      if (point[0] !== last[0] || point[1] !== last[1]) stroke.points.push(point);
    }
  }
  draw();
});
large.addEventListener("pointerup", () => {
  dragged = null;
  if (stroke) {
    const done = stroke;
    // One after the other, since each names the state that it changes.
    sending = sending.then(() => send("stroke", done)).then(() => { if (stroke === done) stroke = null; draw(); });
  }
});
large.addEventListener("pointercancel", () => { dragged = stroke = null; draw(); });
large.addEventListener("pointerleave", () => { pointer = null; draw(); });
large.addEventListener("wheel", (event) => {
  event.preventDefault();
  if (!now?.place || rating()) return;
  const box = large.getBoundingClientRect();
  zoom(event.deltaY < 0 ? 2 : 0.5, (event.clientX - box.left) * large.width / box.width,
    (event.clientY - box.top) * large.height / box.height);
  draw();
}, {passive: false});
addEventListener("resize", () => { if (now?.place) { fitCanvas(large); } draw(); });

let trouble = "";  // what has kept the page from being refreshed
async function refresh() {
  const said = find("#said");
  try {
    const answer = await fetch("state");
    const found = await answer.json();
    // Another tab or rater may have answered; a region that is being looked at stays.
    if (!answer.ok) throw new Error(found.error);
    if (said.textContent === trouble) said.textContent = "";
    if (!now) { fitCanvas(large); show(found); }
    else if (!busy && !stroke && found.state === now.state) show({...found, place: now.place ?? found.place}, said.textContent);
    else if (!busy && !stroke && found.state > now.state) show(found, "another tab of this rater has answered: here is what comes next");
  } catch (error) {
    trouble = error instanceof TypeError || error instanceof SyntaxError ?
      "desra review does not answer any more: start it again; every answer that was taken is kept" : error.message;
    said.textContent = trouble;
  }
}
refresh();
setInterval(() => { if (!busy) refresh(); }, 3000);
