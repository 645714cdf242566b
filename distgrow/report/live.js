"use strict";
const INTERVAL_MS = 1000;
const content = document.getElementById("content"), state = document.getElementById("state");
let seen = "", since = "";

async function follow() {
  try {
    if (!document.hidden) await look();
  } catch {
    state.textContent = `not reached since ${since}: is distgrow report --serve still running?`;
  }
  setTimeout(follow, INTERVAL_MS);
}

async function look() {
  const answer = await fetch("content", { cache: "no-store", headers: seen ? { "If-None-Match": seen } : {} });
  since = new Date().toLocaleTimeString();
  if (answer.status === 200) {
    await show(await answer.text());
    seen = answer.headers.get("ETag");
  }
  const written = answer.headers.get("Age");
  state.textContent = `live, as of ${since}` + (written === null ? "" : `; the last line was written ${age(Number(written))} ago`);
}

function age(seconds) {
  return seconds < 120 ? `${seconds} s` : seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

// Everything is replaced at once, pictures decoded, so that nothing jumps; what the reader opened or moved stays so.
async function show(html) {
  const fresh = document.createElement("template");
  fresh.innerHTML = html;
  const next = document.importNode(fresh.content, true);
  await Promise.all([...next.querySelectorAll("img")].map((image) => image.decode().catch(() => {})));
  keep(next, "details", "open");
  keep(next, "input", "checked");
  const moved = [...content.querySelectorAll(".wide, pre")].map((part) => part.scrollLeft);
  content.replaceChildren(next);
  content.querySelectorAll(".wide, pre").forEach((part, index) => { part.scrollLeft = moved[index] ?? 0; });
}

function keep(next, which, property) {
  const before = content.querySelectorAll(which);
  next.querySelectorAll(which).forEach((part, index) => {
    if (before[index]) part[property] = before[index][property];
  });
}

follow();
