// Pictures of a .region can be enlarged in #viewer and flipped through; the page reads well without.
"use strict";
const rows = [...document.querySelectorAll(".region")];
const viewer = document.querySelector("#viewer");
const [large, title, tabs] = ["img", "h2", "nav"].map((name) => viewer.querySelector(name));
let row = 0, kind = "";

function show() {
  const figures = [...rows[row].querySelectorAll("figure")].filter((figure) => figure.querySelector("img"));
  const chosen = figures.find((figure) => figure.dataset.kind === kind) || figures[0];
  const small = chosen.querySelector("img");
  kind = chosen.dataset.kind;
  [large.src, large.alt, large.width, large.height] = [small.src, small.alt, small.width, small.height];
  title.textContent = rows[row].dataset.title || rows[row].querySelector("h3, h4").textContent;
  tabs.replaceChildren(...figures.map((figure) => {
    const tab = document.createElement("button");
    tab.textContent = figure.querySelector("figcaption").textContent;
    tab.setAttribute("aria-pressed", String(figure === chosen));
    tab.onclick = () => { kind = figure.dataset.kind; show(); };
    return tab;
  }));
}

function step(by) {
  const kinds = [...rows[row].querySelectorAll("figure")].filter((figure) => figure.querySelector("img"));
  const now = kinds.findIndex((figure) => figure.dataset.kind === kind);
  kind = kinds[(now + by + kinds.length) % kinds.length].dataset.kind;
  show();
}

function move(by) {
  let next = row + by;
  while (rows[next] && !rows[next].querySelector("img")) next += by;
  if (rows[next] && rows[next].dataset.flip === rows[row].dataset.flip) { row = next; show(); }
}

rows.forEach((region, index) => region.querySelectorAll("figure").forEach((figure) => {
  const image = figure.querySelector("img");
  if (!image) return;
  const open = () => { row = index; kind = figure.dataset.kind; show(); viewer.showModal(); };
  image.tabIndex = 0;
  image.classList.add("enlarges");
  image.onclick = open;
  image.onkeydown = (event) => { if (event.key === "Enter") open(); };
}));
large.onclick = () => {
  const [one, other] = (rows[row].dataset.flip || "mse_sr gan_sr").split(" ");
  kind = kind === other ? one : other;
  show();
};
viewer.onclick = (event) => { if (event.target === viewer) viewer.close(); };
document.onkeydown = (event) => {
  const act = { ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1) };
  if (viewer.open && act[event.key]) { event.preventDefault(); act[event.key](); }
};
document.querySelectorAll(".with-script").forEach((element) => { element.hidden = false; });
