// Live updates, keys, and the gate before a long call is allowed. Every page works without it, but is not live then.
"use strict";
(() => {
  const base = document.body.dataset.base || "";
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const TIMES_MS = 15000, SILENT_MS = 25000, GRACE_MS = 1000, AGAIN_MS = 3000, ROWS_MS = 120, SEEN_MS = 20000;
  const ORDER = "hitl-inbox-order"; // ids of the list as it was shown last, for the keys j and k on a card

  // -- times

  const units = [["d", 86400], ["h", 3600], ["m", 60]];
  function span(seconds) {
    for (const [unit, size] of units) if (seconds >= 2 * size) return Math.floor(seconds / size) + unit;
    return Math.max(Math.floor(seconds), 0) + "s";
  }
  function showTimes() {
    for (const time of all("time[data-time]")) {
      const seconds = (Date.now() - Date.parse(time.dateTime)) / 1000;
      if (time.dataset.time === "age") time.textContent = span(seconds);
      if (time.dataset.time === "left") time.textContent = span(-seconds);
      if (time.dataset.time === "at") time.textContent = new Date(time.dateTime).toLocaleString([], {dateStyle: "medium", timeStyle: "short"});
    }
  }
  setInterval(showTimes, TIMES_MS);

  // -- messages to the reader

  let toastTimer;
  function toast(said) {
    let shown = one("#toast");
    if (!shown) {
      shown = document.createElement("div");
      shown.id = "toast";
      shown.className = "toast";
      shown.setAttribute("role", "status");
      document.body.append(shown);
    }
    shown.textContent = said;
    shown.hidden = false;
    clearTimeout(toastTimer);
    toastTimer = setTimeout(() => { shown.hidden = true; }, 6000);
  }
  document.addEventListener("htmx:sendError", () => toast("The service does not answer. Try again: the same decision counts once."));
  document.addEventListener("htmx:responseError", () => toast("The service failed on this request. Reload the page to see what was recorded."));

  // -- the stream, and what is said while it is cut

  let stream, filtered, heard = Date.now(), cut = false, cutTimer, againTimer, greeted = false;
  const address = (one("[data-stream]") || {dataset: {}}).dataset.stream;

  function setOffline(isCut) {
    if (cut === isCut) return;
    cut = isCut;
    const banner = one("#offline"), live = one("#live");
    banner.hidden = !isCut;
    if (isCut) {
      const since = new Date(heard).toLocaleTimeString([], {hour: "2-digit", minute: "2-digit", second: "2-digit"});
      banner.textContent = `Offline since ${since}. What you see may be out of date, and nothing can be decided until the connection is back.`;
    }
    live.hidden = isCut;
    enable();
  }
  function enable() {
    for (const button of all("[data-live]")) {
      button.disabled = cut || button.dataset.waits === "yes";
    }
  }
  function isHeard() {
    heard = Date.now();
    clearTimeout(cutTimer);
    cutTimer = undefined;
    setOffline(false);
  }
  function connect() {
    clearTimeout(againTimer);
    if (stream) stream.close();
    const list = one("#list"), asked = new URLSearchParams(list ? list.dataset.filters : "");
    if (list) asked.set("rows", "yes");
    filtered = list && list.dataset.filters;
    stream = new EventSource(list ? `${address}?${asked}` : address);
    stream.addEventListener("hello", () => {
      isHeard();
      const live = one("#live");
      live.hidden = false;
      live.innerHTML = "";
      const text = document.createElement("span");
      text.textContent = "Live";
      live.append(text);
      if (greeted) refresh();
      greeted = true;
    });
    stream.addEventListener("ping", isHeard);
    stream.addEventListener("approval", (event) => { isHeard(); changed(JSON.parse(event.data)); });
    stream.addEventListener("refresh", () => { isHeard(); refresh(); });
    stream.addEventListener("signed-out", () => { stream.close(); location.reload(); });
    stream.addEventListener("entry", (event) => { isHeard(); entry(event); });
    stream.addEventListener("typing", (event) => { isHeard(); typing(JSON.parse(event.data)); });
    stream.addEventListener("error", () => {
      cutTimer = cutTimer || setTimeout(() => setOffline(true), GRACE_MS);
      if (stream.readyState !== EventSource.CLOSED) return; // else the browser connects again by itself
      clearTimeout(againTimer);
      againTimer = setTimeout(again, AGAIN_MS);
    });
  }
  if (address) {
    connect();
    setInterval(() => {
      if (Date.now() - heard < SILENT_MS) return;
      setOffline(true);
      connect();
    }, 5000);
    addEventListener("offline", () => setOffline(true));
    addEventListener("online", connect);
    addEventListener("pagehide", () => { clearTimeout(againTimer); stream.close(); });
    addEventListener("pageshow", (event) => { if (event.persisted) connect(); });
  }

  // While the inbox is visible its reader is not notified elsewhere; the service forgets that after a while.
  function seen() {
    if (document.visibilityState === "visible") {
      fetch(`${base}/inbox/seen`, {headers: {"HX-Request": "true"}}).catch(() => undefined);
    }
  }
  if (one("#list") || one("#card")) {
    seen();
    setInterval(seen, SEEN_MS);
    document.addEventListener("visibilitychange", seen);
  }

  // The service answered with something else than a stream: it failed, or the reader is no longer signed in.
  async function again() {
    const answer = await fetch(`${base}/inbox/notifications/device`, {headers: {"HX-Request": "true"}}).catch(() => undefined);
    if (answer && (answer.status === 401 || answer.status === 403)) location.reload();
    else connect();
  }
  function refresh() {
    const list = one("#list"), card = one("#card");
    if (list) htmx.ajax("GET", list.dataset.address, {target: "#list", swap: "outerHTML"});
    if (card) htmx.ajax("GET", card.dataset.address, {target: "#card", swap: "outerHTML"});
  }
  // While a decision of this page is under way its answer shows the call; what changes meanwhile is looked at afterwards.
  let sending = false, missed = false;
  document.addEventListener("htmx:beforeRequest", (event) => { if (event.detail.elt.id === "decide") sending = true; });
  document.addEventListener("htmx:afterOnLoad", sent);
  document.addEventListener("htmx:sendError", sent);
  function sent() {
    if (!sending) return;
    sending = false;
    if (missed) setTimeout(refresh, 50);
    missed = false;
  }
  function changed(call) {
    const card = one("#card");
    if (card && card.dataset.id === call.id) {
      const waits = card.dataset.state === "pending" && call.state === "pending";
      const isBusy = one("details[data-sheet][open], [name=do][value=edit]", card) || card.contains(document.activeElement);
      if (sending) {
        missed = true;
      } else if (waits && card.dataset.news === call.news) {
        // nothing that the card shows
      } else if (waits && isBusy) {
        toast("Someone voted on this call, or looks at it"); // the reader is about to decide: the card stays as it is
      } else if (waits || card.dataset.state !== call.state) {
        if (card.dataset.state === "pending" && call.by) toast(`Decided by ${call.by}`);
        htmx.ajax("GET", card.dataset.address, {target: "#card", swap: "outerHTML"});
      }
    }
    if (one("#list")) changedRow(call);
  }

  // -- the list

  const RANKS = ["critical", "high", "medium", "low"];
  const inOrder = (a, b) => RANKS.indexOf(a.dataset.severity) - RANKS.indexOf(b.dataset.severity) || (a.dataset.id < b.dataset.id ? -1 : 1);
  let fresh = new Map(), freshTimer;
  function changedRow(call) {
    const row = document.getElementById(`row-${call.id}`), list = one("#list");
    if (call.state === "pending") {
      if (!call.row || (row && row.dataset.news === call.news)) return;
      fresh.set(call.id, call.row);
      freshTimer = freshTimer || setTimeout(addRows, ROWS_MS);
    } else {
      fresh.delete(call.id);
      if (!row) return;
      const hadFocus = row.contains(document.activeElement), next = row.nextElementSibling || row.previousElementSibling;
      row.classList.add("gone");
      all("input", row).forEach((box) => { box.checked = false; box.disabled = true; });
      setTimeout(() => {
        row.remove();
        if (hadFocus && next) (one("a.open", next) || document.body).focus();
        counted();
        if (one(".item", list)) return;
        if (one("#none", list)) one("#none", list).hidden = false;
        else refresh(); // they were not all loaded
      }, 900);
    }
    counted();
  }
  // New lines, and lines that changed, at their place. What belongs behind the lines that are loaded comes with them.
  function addRows() {
    freshTimer = undefined;
    const list = one("#list"), made = document.createElement("template");
    made.innerHTML = [...fresh.values()].join(""); // written by the service's own templates
    fresh = new Map();
    if (!list) return;
    const more = one("#more-row", list), rows = all(".item", list), last = rows[rows.length - 1];
    let added = 0;
    for (const row of all(".item", made.content)) {
      const known = document.getElementById(row.id);
      if (known && known.classList.contains("gone")) continue;
      const ticked = known && one(".tick input:checked", known), focused = known && known.contains(document.activeElement);
      if (known) known.remove();
      else if (more && last && inOrder(row, last) > 0) continue;
      else added++;
      const next = all(".item", list).find((other) => inOrder(row, other) < 0) || more;
      one("#rows", list).insertBefore(row, next);
      if (ticked && one(".tick input", row)) one(".tick input", row).checked = true;
      if (focused) one("a.open", row).focus();
    }
    if (one("#none", list)) one("#none", list).hidden = one(".item", list) !== null;
    if (added) one("#news").textContent = added === 1 ? "A new call waits" : `${added} new calls wait`;
    showTimes();
    counted();
  }
  function counted() {
    const list = one("#list"), count = one("#count");
    if (!list || !count) return;
    const rows = all(".item:not(.gone)", list), more = one("#more-row", list) !== null;
    count.textContent = rows.length + (more ? "+" : "");
    count.hidden = !rows.length;
    if (!list.dataset.filters) document.dispatchEvent(new CustomEvent("hitl:count", {detail: rows.length}));
    document.title = (rows.length ? `(${rows.length}${more ? "+" : ""}) ` : "") + document.title.replace(/^\(\d+\+?\) /, "");
    sessionStorage.setItem(ORDER, JSON.stringify(rows.map((row) => row.dataset.id)));
    const boxes = all(".tick input:checked", list), ticked = boxes.length;
    const severity = ticked ? boxes[0].closest(".item").dataset.severity : undefined; // one severity at a time
    for (const box of all(".item:not(.gone) .tick input", list)) box.disabled = ticked > 0 && box.closest(".item").dataset.severity !== severity;
    const batch = one("#batch");
    if (batch) {
      batch.hidden = !ticked;
      one("#ticked").textContent = ticked === 1 ? "1 call" : `${ticked} calls`;
    }
  }

  // -- the card

  function gate(card) {
    const end = one("#end-of-call", card), read = one("input[name=read]", card), allow = all("[data-long]", card);
    if (!end || !read) return;
    const label = read.closest("label");
    label.hidden = true;
    const passed = () => {
      read.checked = true;
      allow.forEach((button) => { button.dataset.waits = "no"; button.removeAttribute("aria-describedby"); });
      const hint = one("#scroll-hint", card);
      if (hint) hint.hidden = true;
      enable();
    };
    allow.forEach((button) => { button.dataset.waits = "yes"; button.setAttribute("aria-describedby", "scroll-hint"); });
    const hint = one("#scroll-hint", card);
    if (hint) hint.hidden = false;
    // A reader who jumps to the end has not scrolled through: every part must have been on the screen.
    const call = one(".call", card), seen = new Set(), PART = 400;
    const look = () => {
      const box = call.getBoundingClientRect(), parts = Math.max(Math.ceil(box.height / PART), 1);
      const first = Math.floor(Math.max(-box.top, 0) / PART), last = Math.floor((innerHeight - box.top) / PART);
      for (let part = first; part <= Math.min(last, parts - 1); part++) seen.add(part);
      if (seen.size < parts) return;
      removeEventListener("scroll", look);
      passed();
    };
    addEventListener("scroll", look, {passive: true});
    look();
    enable();
  }
  function openSheet(name, focus) {
    const sheet = one(`details[data-sheet=${name}]`);
    if (!sheet) return;
    sheet.open = true;
    const target = one(focus, sheet);
    if (target) target.focus();
  }
  function closeSheets(except) {
    let closed = false;
    for (const sheet of all("details[data-sheet][open]")) if (sheet !== except) { sheet.open = false; closed = true; }
    return closed;
  }
  document.addEventListener("click", (event) => {
    const inside = event.target.closest("details[data-sheet]");
    closeSheets(inside);
    if (event.target.closest("[data-close]")) closeSheets();
    const opens = event.target.closest("[data-dialog]");
    if (opens) document.getElementById(opens.dataset.dialog).showModal();
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches(".tick input")) counted();
    if (event.target.matches("[data-submit]")) event.target.form.requestSubmit();
  });

  // -- the session

  function entry(event) {
    const log = one("#log");
    if (!log) return;
    const atEnd = !log.lastElementChild || log.lastElementChild.getBoundingClientRect().top < innerHeight;
    const live = one("#typing");
    if (live) { live.hidden = true; one("pre, .typing", live).textContent = ""; live.dataset.event = ""; }
    if (event.data) {
      const template = document.createElement("template");
      template.innerHTML = event.data; // written by the service's own templates
      log.append(template.content);
      showTimes();
    }
    if (event.lastEventId) log.dataset.after = event.lastEventId;
    if (atEnd && log.lastElementChild) log.lastElementChild.scrollIntoView({block: "end"});
    clearTimeout(stateTimer);
    stateTimer = setTimeout(() => {
      const state = one("#state");
      if (state) htmx.ajax("GET", state.dataset.address, {target: "#state", swap: "outerHTML"});
    }, 150);
  }
  let stateTimer;
  function typing(part) {
    const live = one("#typing");
    if (!live) return;
    const text = one(".typing", live);
    if (live.dataset.event !== part.id) { live.dataset.event = part.id; text.textContent = ""; }
    text.textContent += part.text;
    live.hidden = false;
  }

  // -- keys

  function order() {
    try { return JSON.parse(sessionStorage.getItem(ORDER)) || []; } catch { return []; }
  }
  function step(by) {
    const rows = all(".item:not(.gone) a.open");
    if (rows.length) {
      const now = rows.findIndex((row) => row.closest(".item").contains(document.activeElement));
      const next = rows[now < 0 ? (by > 0 ? 0 : rows.length - 1) : Math.min(Math.max(now + by, 0), rows.length - 1)];
      next.focus();
      next.scrollIntoView({block: "nearest"});
      if (by > 0 && next === rows[rows.length - 1]) { const more = one("#more"); if (more && now === rows.length - 1) more.click(); }
      return;
    }
    const card = one("#card");
    if (!card) return;
    const ids = order(), now = ids.indexOf(card.dataset.id), next = ids[now + by];
    location.href = next ? `${base}/inbox/a/${encodeURIComponent(next)}` : by > 0 && now < 0 ? `${base}/inbox/next` : `${base}/inbox`;
  }
  const keys = {
    j: () => step(1),
    k: () => step(-1),
    o: () => { const row = document.activeElement.closest(".item") || one(".item"); if (row) one("a.open", row).click(); },
    x: () => { const row = document.activeElement.closest(".item"); if (row) { one(".tick input", row).click(); } },
    a: () => {
      const button = one("#card [data-key=allow]") || one("#batch:not([hidden]) .allow");
      if (!button) return;
      if (button.disabled) { toast(cut ? "Offline: nothing can be decided now" : "Scroll through all of it first"); return; }
      closeSheets();
      button.focus();
      toast("Press Enter to allow");
    },
    d: () => { if (one("#card")) openSheet("deny", "textarea, input"); else { const button = one("#batch:not([hidden]) .deny"); if (button) button.focus(); } },
    e: () => openSheet("edit", "textarea"),
    r: () => openSheet("remember", "input"),
    n: () => { const next = one("#next-call"); if (next) next.click(); },
    u: () => { location.href = `${base}/inbox`; },
    "/": () => { const search = one("#search"); if (search) search.focus(); },
    "?": () => { const help = one("#keys"); if (help && !help.open) help.showModal(); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      const sheet = document.activeElement.closest("details[data-sheet]");
      if (closeSheets() && sheet) one("summary", sheet).focus();
      return;
    }
    if (event.target.closest("textarea, select, input:not([type=checkbox]):not([type=radio])") || one("dialog[open]")) return;
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  // -- each new part of a page

  function begin(part) {
    showTimes();
    const card = part.matches && part.matches("#card") ? part : one("#card", part);
    if (card) {
      gate(card);
      const focus = one("[data-focus]", card);
      if (focus) focus.focus();
    }
    counted();
    enable();
  }
  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target.id !== "results") return;
    for (const box of all(".tick input:checked")) box.checked = false;
    counted();
    event.detail.target.scrollIntoView({block: "nearest"});
  });
  document.addEventListener("htmx:load", (event) => {
    begin(event.detail.elt);
    const list = one("#list");
    if (list && list.dataset.filters !== filtered) connect();
  });
  begin(document.body);
  const last = one("#log > :last-child");
  if (last && !one("#state .main-button")) last.scrollIntoView({block: "end"}); // what waits for a decision is at the top
})();
