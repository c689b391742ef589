"use strict";
(() => {
  const root = document.documentElement;
  const toggle = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => { toggle.textContent = isDark() ? "Light theme" : "Dark theme"; };
  toggle.hidden = false;
  toggle.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  name();

  const said = document.getElementById("said");
  for (const table of document.querySelectorAll("table.sortable")) {
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
      const rows = next === "none" ? original : [...original].sort(compare(index, next === "ascending" ? 1 : -1));
      body.append(...rows);
      said.textContent = next === "none" ? "in the recipe's order" : `sorted by ${head.dataset.name}, ${next}`;
    }));
  }

  const tip = document.getElementById("tip");
  const light = (variant, on) => {
    for (const row of document.querySelectorAll("tr[data-variant]")) row.classList.toggle("lit", on && row.dataset.variant === variant);
  };
  for (const mark of document.querySelectorAll(".mark")) {
    const show = () => {
      const panel = tip.parentElement.getBoundingClientRect(), box = mark.getBoundingClientRect();
      tip.textContent = mark.getAttribute("aria-label");
      tip.hidden = false;
      const left = box.left + box.width / 2 - panel.left - tip.offsetWidth / 2;
      tip.style.left = `${Math.max(4, Math.min(left, panel.width - tip.offsetWidth - 4))}px`;
      tip.style.top = `${Math.max(4, box.top - panel.top - tip.offsetHeight - 8)}px`;
      light(mark.dataset.variant, true);
    };
    const hide = () => { tip.hidden = true; light(mark.dataset.variant, false); };
    mark.addEventListener("pointerenter", show);
    mark.addEventListener("focus", show);
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("blur", hide);
    mark.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  }
})();
