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
  let list, found, page;

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

  function thumbnail(image, label) {
    const made = element("span", "thumb");
    const place = image % (columns * rows);
    const percent = (k, of) => (of > 1 ? (100 * k) / (of - 1) : 0);
    made.setAttribute("role", "img");
    made.setAttribute("aria-label", label);
    made.style.backgroundImage = `url(${sheetURL(Math.floor(image / (columns * rows)))})`;
    made.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
    made.style.backgroundPosition =
      `${percent(place % columns, columns)}% ${percent(Math.floor(place / columns), rows)}%`;
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
    const ap = list.ap[q];
    const result = ap === null ? "no match in the gallery" : `AP ${(100 * ap).toFixed(1)} %, first right: ${list.first[q]}`;
    words.append(element("span", "muted", result));
    left.append(words);

    const ranks = element("ol", "ranks");
    let rank = 0;
    list.images[q].forEach((other, k) => {
      const [kind, sign] = KINDS[list.kinds[q][k]];
      if (kind !== "ignored") rank += 1;
      else if (!get("ignored").checked) return;
      const item = element("li", kind);
      const where = `camera ${data.camids[other]}`, distance = list.distances[q][k].toFixed(3);
      const name = kind === "ignored" ? `ignored, ${list.rule[0]}` : `${rank}: ${kind}`;
      item.append(thumbnail(other, `${name}, pid ${data.pids[other]}, ${where}, distance ${distance}`));
      const mark = element("span", `mark ${kind}`, sign);
      mark.setAttribute("aria-hidden", "true");
      const below = element("span", "", `pid ${data.pids[other]}`);
      below.setAttribute("aria-hidden", "true");
      below.append(element("br"), distance, element("br"), `cam ${data.camids[other]}`);
      if (kind === "ignored") below.append(element("span", "reason", list.rule[0]));
      item.append(mark, below);
      ranks.append(item);
    });
    line.append(left, ranks);
    return line;
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    get("queries").replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(queryLine));
    get("page").textContent = `page ${page + 1} of ${pages}`;
    get("previous").disabled = page === 0;
    get("next").disabled = page === pages - 1;
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
      const result = first === 0 ? "none" : first === 1 ? "right" : "wrong";
      if (pid && String(data.pids[image]) !== pid) continue;
      if (outcome !== "all" && outcome !== result) continue;
      if (queryCamera && String(data.camids[image]) !== queryCamera) continue;
      if (galleryCamera && String(data.camids[firstImage(q)]) !== galleryCamera) continue;
      found.push(q);
    }
    const scored = found.filter((q) => list.ap[q] !== null);
    const mean = scored.reduce((sum, q) => sum + list.ap[q], 0) / scored.length;
    if (order !== "dataset") {  // queries without a match have no AP: last, either way
      const sign = order === "worst" ? 1 : -1;
      found.sort((a, b) => (list.ap[a] === null) - (list.ap[b] === null) || sign * (list.ap[a] - list.ap[b]));
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
    cameras("query-camera", list.queries);
    cameras("gallery-camera", list.images.flat());
    get("rule").textContent = list.rule[1] || "none in this protocol";
    get("ignored").closest("label").hidden = !list.rule[1];
    filter();
  }

  document.documentElement.style.setProperty("--ratio", `${width} / ${height}`);
  get("list").append(...data.lists.map((each, k) => new Option(each.title, k)));
  get("list").closest("label").hidden = data.lists.length < 2;
  get("list").addEventListener("change", choose);
  for (const id of ["outcome", "query-camera", "gallery-camera", "order"]) get(id).addEventListener("change", filter);
  get("pid").addEventListener("input", filter);
  get("ignored").addEventListener("change", show);
  get("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    get(id).addEventListener("click", () => {
      page += step;
      show();
      get("status").scrollIntoView({ block: "center" });
    });
  }
  choose();
})();
