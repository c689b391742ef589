"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const root = document.documentElement;
  const said = document.getElementById("said");

  // Theme: the system's until a person says otherwise.
  const toggle = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => { toggle.textContent = isDark() ? "Light theme" : "Dark theme"; };
  toggle.hidden = false;
  toggle.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  name();

  // Sorting: better first, then the other way, then the order the page came in.
  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    const key = (row, index) => row.cells[index].dataset.sort;
    const compare = (index, sign) => (a, b) => {
      const left = key(a, index), right = key(b, index);
      if (left === "" || right === "") return (left === "") - (right === "");  // what was not measured stays last
      return sign * (index === 0 ? left.localeCompare(right) : Number(left) - Number(right));
    };
    heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
      const first = head.dataset.better === "high" ? "descending" : "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const now = head.getAttribute("aria-sort");
      const next = now === first ? second : now === second ? "none" : first;
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      body.append(...(next === "none" ? original : [...original].sort(compare(index, next === "ascending" ? 1 : -1))));
      said.textContent = next === "none" ? "in the original order" : `sorted by ${head.dataset.name}, ${next}`;
    }));
  }

  // Filtering: the main table decides, everything that belongs to a variant follows.
  const form = document.querySelector("form.filter");
  const rows = all("tr[data-find]");
  const passes = (row, wanted) => {
    const { find, lost, loss, memory, speed } = row.dataset;
    const words = wanted.find.trim().toLowerCase().split(/\s+/);
    if (!words.every((word) => find.toLowerCase().includes(word))) return false;
    if (wanted.loss === "none" && lost !== "no") return false;
    if (wanted.loss > 0 && !(loss !== "" && Number(loss) <= Number(wanted.loss))) return false;
    if (wanted.memory && !(memory !== "" && Number(memory) <= Number(wanted.memory))) return false;
    return !(wanted.speed && !(speed !== "" && Number(speed) >= Number(wanted.speed)));
  };
  const filter = () => {
    const wanted = Object.fromEntries(new FormData(form));
    const kept = new Set(rows.filter((row) => passes(row, wanted)).map((row) => row.dataset.variant));
    for (const row of all("tr[data-variant]")) row.hidden = !kept.has(row.dataset.variant);
    for (const mark of all("svg [data-variant]")) mark.classList.toggle("faded", !kept.has(mark.dataset.variant));
    said.textContent = kept.size === rows.length ? `all ${rows.length} shown` : `${kept.size} of ${rows.length} shown`;
  };
  if (form) {
    form.hidden = false;
    form.addEventListener("input", filter);
    form.addEventListener("change", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
  }

  // Details of whatever is pointed at or focused.
  const tip = document.getElementById("tip");
  const light = (variant, on) => {
    for (const other of all("[data-variant]")) other.classList.toggle("lit", on && variant !== undefined && other.dataset.variant === variant);
  };
  const show = (target) => {
    const box = target.getBoundingClientRect();
    tip.textContent = target.dataset.tip || target.getAttribute("aria-label");
    tip.hidden = false;
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${window.scrollX + Math.max(6, Math.min(left, root.clientWidth - tip.offsetWidth - 6))}px`;
    tip.style.top = `${window.scrollY + (above > 4 ? above : box.bottom + 8)}px`;
    if (target.closest("svg")) light(target.dataset.variant, true);
  };
  const hide = () => { tip.hidden = true; light(undefined, false); };
  for (const target of all("[data-tip], .mark")) {
    target.addEventListener("pointerenter", () => show(target));
    target.addEventListener("focus", () => { show(target); target.setAttribute("aria-describedby", "tip"); });
    target.addEventListener("pointerleave", hide);
    target.addEventListener("blur", () => { hide(); target.removeAttribute("aria-describedby"); });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // One stop of the tab key for every table and drawing; arrow keys move inside.
  const lines = (group) => group.tagName === "TABLE"
    ? [...group.tBodies[0].rows].filter((row) => !row.hidden).map((row) => all("[data-tip]", row)).filter((line) => line.length)
    : all(".mark:not(.faded)", group).map((mark) => [mark]);
  for (const group of all("table.sortable, table.heat, svg.plot")) {
    const items = lines(group).flat();
    items.slice(1).forEach((item) => { item.tabIndex = -1; });
    group.addEventListener("focusin", (event) => {
      const item = event.target;
      if (!item.matches("[data-tip], .mark") || item.closest("thead")) return;
      for (const other of all('[tabindex="0"], a.value:not([tabindex="-1"])', group)) if (!other.closest("thead")) other.tabIndex = -1;
      item.tabIndex = 0;
    });
    group.addEventListener("keydown", (event) => {
      const grid = lines(group);
      const row = grid.findIndex((line) => line.includes(event.target));
      if (row < 0) return;
      const column = grid[row].indexOf(event.target);
      const across = group.tagName === "TABLE" ? [0, 1] : [1, 0];
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: across.map((step) => -step), ArrowRight: across };
      const move = moves[event.key];
      if (!move && event.key !== "Home" && event.key !== "End") return;
      event.preventDefault();
      const line = grid[Math.max(0, Math.min(row + (move ? move[0] : 0), grid.length - 1))];
      const at = move ? column + move[1] : event.key === "Home" ? 0 : line.length - 1;
      line[Math.max(0, Math.min(at, line.length - 1))].focus();
    });
  }

  // Drawings as files: the page's own style goes along, in the theme that is shown.
  const asFile = (svg) => {
    const copy = svg.cloneNode(true);
    const [x, y, width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const tall = height + Number(svg.dataset.legend || 0);
    const style = document.createElementNS(svg.namespaceURI, "style");
    style.textContent = document.querySelector("style").textContent;
    const back = document.createElementNS(svg.namespaceURI, "rect");
    for (const [key, value] of Object.entries({ x, y, width: "100%", height: "100%", style: "fill: var(--surface)" })) back.setAttribute(key, value);
    copy.prepend(style, back);
    for (const [key, value] of Object.entries({ width, height: tall, viewBox: [x, y, width, tall].join(" ") })) copy.setAttribute(key, value);
    copy.dataset.theme = isDark() ? "dark" : "light";
    copy.style.cssText = `display: block; width: ${width}px; height: ${tall}px; max-width: none; margin: 0`;
    return { text: new XMLSerializer().serializeToString(copy), width, height: tall };
  };
  const save = (blob, file) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const savePng = (drawing, file) => {
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [2 * drawing.width, 2 * drawing.height];
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, file), "image/png");
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(drawing.text)}`;
  };
  for (const tools of all(".tools[hidden]")) tools.hidden = false;
  for (const button of all("button[data-save]")) {
    button.setAttribute("aria-label", `download ${button.dataset.file} as ${button.dataset.save.toUpperCase()}`);
    button.addEventListener("click", () => {
      const drawing = asFile(button.closest("figure, section").querySelector("svg"));
      const file = `${button.dataset.file}.${button.dataset.save}`;
      if (button.dataset.save === "png") savePng(drawing, file);
      else save(new Blob([drawing.text], { type: "image/svg+xml" }), file);
      said.textContent = `${file} downloaded`;
    });
  }
})();
