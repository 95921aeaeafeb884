// Text, cells and tables of the dashboard. Everything that the planner sends is text that others chose: it reaches the
// page through textContent only. `load_page` puts all scripts into one block of the page, this one first.
const ROWS = matchMedia("(max-width: 46rem)").matches ? 6 : 8; // of a list, until all are asked for
const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");
const counted = (value, noun) => `${count.format(value)} ${noun}${value === 1 ? "" : "s"}`;
const number = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits });

// --- text ------------------------------------------------------------------------------------------------------
// Control characters, and those that turn the direction of writing, must not disguise what stands beside them.
const plain = (text) => String(text ?? "").replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "�");
const two = (value) => String(value).padStart(2, "0");

function time(seconds, exact) {
  const left = Math.max(0, seconds);
  if (exact && left < 10) return left < 0.01 ? "< 0.01 s" : `${left.toFixed(2)} s`;
  const whole = Math.floor(left);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} m ${two(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor(whole / 60) % 60)} m`;
  return `${Math.floor(whole / 86400)} d ${Math.floor(whole / 3600) % 24} h`;
}

const rate = (value) => value.toLocaleString("en", value < 10 ? { minimumFractionDigits: 2, maximumFractionDigits: 2 } : { maximumFractionDigits: 1, minimumFractionDigits: 1 });

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  while (value >= 1000 && at < units.length - 1) {
    value /= 1000;
    at += 1;
  }
  return `${number(value, value < 10 && at ? 2 : value < 100 && at ? 1 : 0)} ${units[at]}`;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = plain(text);
  return made;
}

// --- cells: { text, sub, badge, bar, age, until, link, mono, tone, acts } ------------------------------------------------
// Ages go on counting between two answers: an element with data-zero shows its distance from that moment.
const clock = () => performance.now() / 1000;

function tick(all) {
  const now = clock();
  for (const each of all ?? document.querySelectorAll("[data-zero]")) {
    const away = each.dataset.until ? each.dataset.zero - now : now - each.dataset.zero;
    each.textContent = (each.dataset.before ?? "") + time(away) + (each.dataset.after ?? "");
  }
}

function ticking(tag, zero, { until, before, after, className } = {}) {
  const made = element(tag, className);
  made.dataset.zero = zero;
  if (until) made.dataset.until = "1";
  if (before) made.dataset.before = before;
  if (after) made.dataset.after = after;
  tick([made]);
  return made;
}

function paint(td, cell) {
  const { zero, ...rest } = cell;
  const same = JSON.stringify(rest);
  if (td.painted === same) {
    if (zero !== undefined) td.querySelector("[data-zero]").dataset.zero = zero;
    return;
  }
  td.painted = same;
  td.replaceChildren();
  td.classList.remove("warn", "bad", "blank");
  if (cell.tone && !cell.badge) td.classList.add(cell.tone);
  if (zero === undefined && !cell.text && !cell.sub && !cell.acts?.length) td.classList.add("blank");
  const className = [cell.mono && "mono", cell.badge && "badge", cell.badge && cell.tone].filter(Boolean).join(" ");
  let main;
  if (zero !== undefined) {
    main = ticking("span", zero, { ...cell, className });
  } else {
    main = element(cell.link ? "a" : "span", className, cell.text);
    if (cell.link) main.href = cell.link;
  }
  if (cell.title) main.title = plain(cell.title);
  td.append(main);
  if (cell.bar !== undefined) {
    const bar = element("span", "bar");
    const fill = element("i");
    fill.style.width = `${Math.round(100 * Math.min(1, Math.max(0, cell.bar)))}%`;
    bar.append(fill);
    td.append(bar);
  }
  if (cell.sub) td.append(element("span", "sub", cell.sub));
  for (const [label, run] of cell.acts ?? []) td.append(action(label, run));
}

// A button that acts when it is pressed twice: the second press confirms.
function action(label, run) {
  const made = element("button", "act", label);
  made.type = "button";
  let asked = 0;
  made.addEventListener("click", () => {
    clearTimeout(asked);
    if (made.textContent === label) {
      made.textContent = `${label}: sure?`;
      asked = setTimeout(() => (made.textContent = label), 5000);
    } else {
      made.disabled = true;
      run().finally(() => {
        made.disabled = false;
        made.textContent = label;
      });
    }
  });
  return made;
}

// --- tables ------------------------------------------------------------------------------------------------------
class Table {
  constructor(id, columns, nameOf, empty, rows = ROWS) {
    this.section = $(id);
    this.columns = columns;
    this.nameOf = nameOf;
    this.rows = new Map();
    this.closed = rows; // rows that are shown until all are asked for
    this.open = false;
    this.table = element("table");
    const head = element("tr");
    for (const [label, className] of columns) {
      const th = element("th", className);
      if (label) th.append(term(label));
      th.scope = "col";
      head.append(th);
    }
    this.table.createTHead().append(head);
    this.body = this.table.createTBody();
    this.empty = element("p", "empty", empty);
    this.more = element("p", "more");
    this.button = element("button");
    this.button.type = "button";
    this.note = element("span");
    this.more.append(this.button, " ", this.note);
    this.button.addEventListener("click", () => {
      this.open = !this.open;
      this.fill(...this.last);
    });
    this.section.append(this.table, this.empty, this.more);
  }

  fill(entries, note, empty) {
    this.last = [entries, note, empty];
    const shown = this.open ? entries : entries.slice(0, this.closed);
    const rows = new Map();
    for (const entry of shown) {
      let name = this.nameOf(entry);
      while (rows.has(name)) name += "'";
      const row = this.rows.get(name) ?? this.newRow();
      rows.set(name, row);
      this.columns.forEach(([, , cell], at) => paint(row.cells[at], cell(entry)));
    }
    for (const [name, row] of this.rows) if (!rows.has(name)) row.remove();
    let at = 0;
    for (const row of rows.values()) {
      if (this.body.rows[at] !== row) this.body.insertBefore(row, this.body.rows[at] ?? null);
      at += 1;
    }
    this.rows = rows;
    this.table.hidden = !entries.length;
    this.empty.hidden = !!entries.length;
    if (empty) this.empty.textContent = empty;
    this.button.hidden = entries.length <= this.closed;
    this.button.textContent = this.open ? "Show less" : `Show ${entries.length - this.closed} more`;
    this.note.textContent = note ?? "";
    this.more.hidden = this.button.hidden && !note;
  }

  newRow() {
    const row = element("tr");
    for (const [label, className] of this.columns) {
      const td = element("td", className);
      td.dataset.label = label;
      row.append(td);
    }
    return row;
  }
}
