// The browser of rankings. The data is the JSON beside this script (reporting/report.py, browser()); a list of
// rankings is filtered whole at each change, which takes a few milliseconds, and one page of it is drawn, so
// that only the sheets of thumbnails on that page are ever decoded.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const PER_PAGE = 10;
  const [columns, rows] = data.sheet;
  const [height, width] = data.thumbnail;
  const KINDS = { r: ["right", "✓"], w: ["wrong", "✗"], i: ["ignored", "–"] };
  const urls = [];
  let list, other, found, page;  // other: the list beside it, of the same queries; undefined: none

  // A sheet as a blob: its text is decoded once, and the browser keeps pixels only of what it paints.
  function sheetURL(k) {
    if (!urls[k]) {
      const [head, body] = data.sheets[k].split(",");
      const bytes = Uint8Array.from(atob(body), (character) => character.charCodeAt(0));
      urls[k] = URL.createObjectURL(new Blob([bytes], { type: head.slice(5, head.indexOf(";")) }));
    }
    return urls[k];
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function thumbnail(image, label, kind = "button") {
    const made = element(kind, "thumb");
    const place = image % (columns * rows);
    const percent = (k, of) => (of > 1 ? (100 * k) / (of - 1) : 0);
    if (kind === "button") made.type = "button";
    else made.setAttribute("role", "img");
    made.setAttribute("aria-label", label);
    made.style.backgroundImage = `url(${sheetURL(Math.floor(image / (columns * rows)))})`;
    made.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
    made.style.backgroundPosition =
      `${percent(place % columns, columns)}% ${percent(Math.floor(place / columns), rows)}%`;
    made.dataset.image = image;
    return made;
  }

  function queryLine(q) {
    const line = element("li");
    const image = list.queries[q];
    const pid = data.pids[image], camera = data.camids[image];
    const modality = data.infrared[image] ? "infrared" : "visible";
    const left = element("div", "query");
    left.append(thumbnail(image, `query: pid ${pid}, camera ${camera}, ${modality}`));
    const words = element("p");
    words.append(element("b", "", `pid ${pid}`), element("br"), `camera ${camera}, ${modality}`, element("br"));
    left.append(words);
    const right = element("div", "results");
    for (const each of other ? [list, other] : [list]) right.append(...ranking(each, q));
    line.append(left, right);
    line.querySelectorAll("button").forEach((button, k) => { button.tabIndex = k ? -1 : 0; });  // see walk()
    return line;
  }

  // What a list has for query q: a line of words, and its images.
  function ranking(each, q) {
    const ap = each.ap[q];
    const words = element("p");
    if (other) words.append(element("b", "", `${each === list ? "A" : "B"}: ${each.label}`), ", ");
    words.append(ap === null ? "no match in the gallery" : `AP ${(100 * ap).toFixed(1)} %, first right: ${each.first[q]}`);
    const ranks = element("ol", "ranks");
    let rank = 0;
    each.images[q].forEach((image, k) => {
      const [kind, sign] = KINDS[each.kinds[q][k]];
      if (kind !== "ignored") rank += 1;
      else if (!get("ignored").checked) return;
      const item = element("li", kind);
      const where = `camera ${data.camids[image]}`, distance = each.distances[q][k].toFixed(3);
      const name = kind === "ignored" ? `ignored, ${each.rule[0]}` : `${rank}: ${kind}`;
      item.append(thumbnail(image, `${name}, pid ${data.pids[image]}, ${where}, distance ${distance}`));
      const mark = element("span", `mark ${kind}`, sign);
      mark.setAttribute("aria-hidden", "true");
      const below = element("span", "", `pid ${data.pids[image]}`);
      below.setAttribute("aria-hidden", "true");
      below.append(element("br"), distance, element("br"), `cam ${data.camids[image]}`);
      if (kind === "ignored") below.append(element("span", "reason", each.rule[0]));
      item.append(mark, below);
      ranks.append(item);
    });
    return [words, ranks];
  }

  // A query is one stop of the Tab key; the arrow keys go through its images.
  function walk(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const thumb = event.target.closest(".thumb");
    if (!step || !thumb) return;
    event.preventDefault();
    const all = [...thumb.closest("#queries > li").querySelectorAll(".thumb")];
    const next = all[all.indexOf(thumb) + step];
    if (!next) return;
    thumb.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  function enlarge(title, ...content) {
    get("enlarged-title").textContent = title;
    get("enlarged-content").replaceChildren(...content);
    get("enlarged").showModal();
  }

  // The image beside the query's, as large as the thumbnail is clear.
  function enlargeImage(thumb) {
    const query = thumb.closest("#queries > li").querySelector(".query .thumb");
    const shown = [...new Set([query, thumb])].map((each) => {
      const made = element("figure");
      const label = each.getAttribute("aria-label");
      made.append(thumbnail(Number(each.dataset.image), label, "span"), element("figcaption", "", label));
      return made;
    });
    enlarge(thumb.getAttribute("aria-label"), ...shown);
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    get("queries").replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(queryLine));
    get("page").textContent = `page ${page + 1} of ${pages}`;
    // Not `disabled`, which would take the focus from who pages with the keyboard.
    get("previous").setAttribute("aria-disabled", page === 0);
    get("next").setAttribute("aria-disabled", page === pages - 1);
  }

  function firstImage(q) {
    return list.images[q].find((_, k) => list.kinds[q][k] !== "i");
  }

  function filter() {
    const pid = get("pid").value.trim(), outcome = get("outcome").value, order = get("order").value;
    const queryCamera = get("query-camera").value, galleryCamera = get("gallery-camera").value;
    found = [];
    for (let q = 0; q < list.queries.length; q += 1) {
      const image = list.queries[q], first = list.first[q];
      const result = [first === 0 ? "none" : first === 1 ? "right" : "wrong"];
      if (other && first !== 0) {
        const also = other.first[q] === 1;
        result.push(first === 1 ? (also ? "both" : "first") : also ? "second" : "neither");
      }
      if (pid && String(data.pids[image]) !== pid) continue;
      if (outcome !== "all" && !result.includes(outcome)) continue;
      if (queryCamera && String(data.camids[image]) !== queryCamera) continue;
      if (galleryCamera && String(data.camids[firstImage(q)]) !== galleryCamera) continue;
      found.push(q);
    }
    const scored = found.filter((q) => list.ap[q] !== null);
    const mean = scored.reduce((sum, q) => sum + list.ap[q], 0) / scored.length;
    if (order !== "dataset") {  // queries without a match have no AP: last, either way
      const sign = order === "best" || order === "gain" ? -1 : 1;
      const value = (q) => list.ap[q] - (order === "gain" || order === "loss" ? other.ap[q] : 0);
      found.sort((a, b) => (list.ap[a] === null) - (list.ap[b] === null) || sign * (value(a) - value(b)));
    }
    get("status").textContent =
      `${found.length.toLocaleString("en")} of ${list.queries.length.toLocaleString("en")} queries of trial ${list.trial}` +
      (scored.length ? `; their mean AP is ${(100 * mean).toFixed(2)} %` : "");
    page = 0;
    show();
  }

  function cameras(id, images) {
    const select = get(id), chosen = select.value;
    const known = [...new Set(images.map((image) => data.camids[image]))].sort((a, b) => a - b);
    select.replaceChildren(new Option("any", ""), ...known.map((camera) => new Option(camera, camera)));
    select.value = known.map(String).includes(chosen) ? chosen : "";
  }

  function choose() {
    list = data.lists[Number(get("list").value)];
    const beside = data.lists.map((each, k) => [each, k]).filter(([each]) => each !== list && each.search === list.search);
    const chosen = get("other").value;
    get("other").replaceChildren(new Option("nothing", ""), ...beside.map(([each, k]) => new Option(each.title, k)));
    get("other").value = beside.some(([, k]) => String(k) === chosen) ? chosen : "";
    get("other").closest("label").hidden = beside.length === 0;
    cameras("query-camera", list.queries);
    cameras("gallery-camera", list.images.flat());
    get("rule").textContent = list.rule[1] || "none in this protocol";
    get("ignored").closest("label").hidden = !list.rule[1];
    pair();
  }

  // What asks for two lists can be chosen only while there are two.
  function pair() {
    other = get("other").value === "" ? undefined : data.lists[Number(get("other").value)];
    get("paired").disabled = !other;
    for (const option of get("order").options) {
      if (option.value === "gain" || option.value === "loss") option.disabled = !other;
    }
    if (get("outcome").selectedOptions[0].parentElement.disabled) get("outcome").value = "all";
    if (get("order").selectedOptions[0].disabled) get("order").value = "dataset";
    filter();
  }

  // A number of a table shows the queries that it counts.
  function open(wanted) {
    for (const id of ["pid", "query-camera", "gallery-camera"]) get(id).value = "";
    get("list").value = wanted.list;
    get("other").value = "";
    choose();
    get("other").value = wanted.other ?? "";
    get("pid").value = wanted.pid ?? "";
    pair();
    get("outcome").value = wanted.outcome;
    filter();
    get("status").scrollIntoView({ block: "start" });
    get("list").focus({ preventScroll: true });
  }

  // What a column is sorted by: of a column of numbers the first number of a cell.
  function sortValue(cell) {
    const text = cell.textContent.trim();
    return cell.classList.contains("number") ? parseFloat(text.replaceAll(",", "")) : text;
  }

  function sort(head) {
    const heads = [...head.parentElement.children], column = heads.indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = head.closest("table").tBodies[0];
    const lines = [...body.rows].map((row) => [sortValue(row.cells[column]), row]);
    lines.sort(([a], [b]) => {
      if (typeof a === "string") return (down ? -1 : 1) * a.localeCompare(b, "en", { numeric: true });
      return Number.isNaN(a) - Number.isNaN(b) || (down ? b - a : a - b) || 0;  // what is no number is last
    });
    body.append(...lines.map(([, row]) => row));
  }

  document.documentElement.style.setProperty("--ratio", `${width} / ${height}`);
  get("list").append(...data.lists.map((each, k) => new Option(each.title, k)));
  get("list").closest("label").hidden = data.lists.length < 2;
  get("list").addEventListener("change", choose);
  get("other").addEventListener("change", pair);
  for (const id of ["outcome", "query-camera", "gallery-camera", "order"]) get(id).addEventListener("change", filter);
  get("pid").addEventListener("input", filter);
  get("ignored").addEventListener("change", show);
  get("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    get(id).addEventListener("click", () => {
      if (get(id).getAttribute("aria-disabled") === "true") return;
      page += step;
      show();
      get("status").scrollIntoView({ block: "center" });
    });
  }
  get("queries").addEventListener("keydown", walk);
  get("queries").addEventListener("click", (event) => {
    const thumb = event.target.closest(".thumb");
    if (thumb) enlargeImage(thumb);
  });
  get("enlarged").addEventListener("click", (event) => {
    if (event.target === event.currentTarget) get("enlarged").close();  // beside what it shows
  });
  for (const button of document.querySelectorAll(".count")) {
    button.addEventListener("click", () => open(button.dataset));
  }
  for (const figure of document.querySelectorAll("main figure")) {
    const title = figure.querySelector("[role=img]").getAttribute("aria-label");
    const button = element("button", "count", "Enlarge");
    const act = () => enlarge(title, ...[...figure.querySelectorAll("svg")].map((svg) => svg.cloneNode(true)));
    button.type = "button";
    button.setAttribute("aria-label", `Enlarge: ${title}`);
    figure.querySelector(".files").append(" ", button);
    for (const target of [button, figure.querySelector(".panels")]) target.addEventListener("click", act);
  }
  for (const head of document.querySelectorAll("thead th")) {
    const button = element("button", "", head.textContent);
    button.type = "button";
    button.addEventListener("click", () => sort(head));
    head.replaceChildren(button);
  }
  choose();
})();
