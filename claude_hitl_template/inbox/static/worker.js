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

// -- notifications

self.addEventListener("push", (event) => event.waitUntil(tell(event.data ? event.data.json() : {})));
async function tell(notice) {
  const path = notice.approval ? `inbox/a/${encodeURIComponent(notice.approval)}` : notice.session ? `sessions/${encodeURIComponent(notice.session)}` : "inbox";
  await self.registration.showNotification(notice.title || "Something waits in your inbox", {
    body: notice.approval ? `Severity: ${notice.severity}` : "",
    tag: notice.approval || notice.id,
    icon: `${STATIC}icon-192.png`,
    badge: `${STATIC}badge-96.png`,
    timestamp: Date.parse(notice.at) || Date.now(),
    requireInteraction: notice.severity === "critical",
    data: {path: root + path},
  });
  const shown = await self.registration.getNotifications();
  if (self.navigator.setAppBadge) await self.navigator.setAppBadge(shown.length).catch(() => undefined); // not installed
}
self.addEventListener("notificationclick", (event) => event.waitUntil(open(event.notification)));
async function open(notification) {
  notification.close();
  const url = new URL(notification.data.path, self.location).href;
  const windows = await self.clients.matchAll({type: "window", includeUncontrolled: true});
  const there = windows.find((one) => one.url === url);
  if (there) return there.focus();
  return self.clients.openWindow(url); // what is open elsewhere stays: someone may be writing there
}

// -- a subscription that the push service replaced

self.addEventListener("pushsubscriptionchange", (event) => event.waitUntil(renew(event)));
async function renew({oldSubscription, newSubscription}) {
  const settings = `${root}inbox/notifications/device`;
  const answer = await fetch(settings, {headers: {"HX-Request": "true"}});
  if (!answer.ok) return; // no one is signed in: the page of notifications says that this device is off
  const {key, csrf} = await answer.json();
  const made = newSubscription || (await self.registration.pushManager.subscribe({userVisibleOnly: true, applicationServerKey: key}));
  const {endpoint, keys} = made.toJSON();
  const body = new URLSearchParams({endpoint, ...keys, csrf, replaces: oldSubscription ? oldSubscription.endpoint : ""});
  const kept = await fetch(`${settings}s`, {method: "POST", body});
  if (!kept.ok) throw new Error(`the subscription was not kept: ${kept.status}`);
}
