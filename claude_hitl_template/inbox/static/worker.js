"use strict";
// The service worker. It keeps the shell only: static files, and the page that says "offline". No page with a call is ever kept.
const root = new URL("..", self.location).pathname; // of all pages of the service
const KEPT = `hitl-shell-${new URL(self.location).searchParams.get("v")}`;
const OFFLINE = `${root}inbox/offline`, STATIC = `${root}inbox/static/`;

// -- the shell

self.addEventListener("install", (event) => event.waitUntil(keepShell()));
async function keepShell() {
  const page = await fetch(OFFLINE, {cache: "no-cache"});
  if (!page.ok) throw new Error(`the offline page answered ${page.status}`);
  const html = await page.clone().text();
  const files = [...html.matchAll(/"([^"]+)"/g)].map((found) => found[1]).filter((path) => path.startsWith(STATIC));
  const kept = await caches.open(KEPT);
  await kept.put(OFFLINE, page);
  await kept.addAll(files);
  await self.skipWaiting();
}
self.addEventListener("activate", (event) => event.waitUntil(begin()));
async function begin() {
  for (const name of await caches.keys()) if (name.startsWith("hitl-shell-") && name !== KEPT) await caches.delete(name);
  if (self.registration.navigationPreload) await self.registration.navigationPreload.enable();
  await self.clients.claim();
}
self.addEventListener("fetch", (event) => {
  const {request} = event, url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== self.location.origin) return;
  if (request.mode === "navigate") event.respondWith(visit(event));
  else if (url.pathname.startsWith(STATIC)) event.respondWith(file(request));
});
async function visit(event) {
  try {
    return (await event.preloadResponse) || (await fetch(event.request));
  } catch {
    return (await caches.match(OFFLINE)) || Response.error();
  }
}
async function file(request) {
  return (await (await caches.open(KEPT)).match(request)) || fetch(request);
}
