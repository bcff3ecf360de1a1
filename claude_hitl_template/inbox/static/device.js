"use strict";
// What the pages have in common with an installed application: the service worker, and the count on the icon.
(() => {
  const {worker, base} = document.body.dataset, AGAIN_MS = 3000;
  if (navigator.serviceWorker) {
    navigator.serviceWorker.register(worker, {scope: `${base}/`}).catch((error) => console.warn("The service worker was not installed:", error));
  }
  document.addEventListener("hitl:count", ({detail: count}) => setBadge(count));
  function setBadge(count) {
    const shown = count ? navigator.setAppBadge && navigator.setAppBadge(count) : navigator.clearAppBadge && navigator.clearAppBadge();
    if (shown) shown.catch(() => undefined); // not installed, so there is no icon
  }
  if (!document.querySelector(".who, #no-connection")) setBadge(0); // no one is signed in

  // Who signs out here is not notified here any more: the push service then says that the device is gone.
  document.addEventListener("submit", async (event) => {
    const form = event.target;
    if (!navigator.serviceWorker || new URL(form.action).pathname !== `${base}/sign-out`) return;
    event.preventDefault();
    const registration = await navigator.serviceWorker.getRegistration();
    const found = registration && registration.pushManager && (await registration.pushManager.getSubscription());
    if (found) await found.unsubscribe().catch((error) => console.warn("This device is still subscribed:", error));
    form.submit();
  });

  // -- the page of notifications

  const page = document.querySelector("#this-device");
  if (page) showDevice(page);
  for (const zone of document.querySelectorAll("[data-guess-zone]")) {
    const own = Intl.DateTimeFormat().resolvedOptions().timeZone;
    if ([...zone.list.options].some((option) => option.value === own)) zone.value = own;
  }
  async function showDevice(page) {
    const state = page.querySelector("#device-state"), button = page.querySelector("#device-on");
    if (!navigator.serviceWorker || !window.PushManager) {
      state.textContent = /iPhone|iPad/.test(navigator.userAgent)
        ? "Add the inbox to the home screen first (Share, then Add to Home Screen), and open it from there."
        : "This browser cannot show notifications, or the address is not https.";
      return;
    }
    if (Notification.permission === "denied") {
      state.textContent = "Notifications of this address are blocked in the settings of this browser.";
      return;
    }
    const found = await (await navigator.serviceWorker.ready).pushManager.getSubscription();
    const name = found && (await fingerprint(found.endpoint)), known = name && document.querySelector(`[data-device="${name}"]`);
    if (known) {
      known.querySelector("[data-here]").hidden = false;
      state.textContent = "Notifications are on.";
      return;
    }
    state.textContent = "Notifications are off.";
    button.hidden = false;
    button.addEventListener("click", async () => {
      button.disabled = true;
      try {
        await turnOn(page.dataset, found);
        location.href = `${location.pathname}?done=on`;
      } catch (error) {
        state.textContent = error.name === "NotAllowedError" ? "Notifications were not allowed in this browser." : `Notifications could not be turned on: ${error.message}`;
        button.disabled = false;
      }
    });
  }
  async function turnOn({address, devices}, stale) {
    const answer = await fetch(address, {headers: {"HX-Request": "true"}});
    if (!answer.ok) throw new Error(`the service answered ${answer.status}`);
    const {key, csrf} = await answer.json(), {pushManager} = await navigator.serviceWorker.ready;
    if (stale) await stale.unsubscribe(); // of another person, or with a key that the service has no more
    const made = await pushManager.subscribe({userVisibleOnly: true, applicationServerKey: key});
    const {endpoint, keys} = made.toJSON();
    const kept = await fetch(devices, {method: "POST", body: new URLSearchParams({endpoint, ...keys, csrf})});
    if (!kept.ok) throw new Error(`the service answered ${kept.status}`);
  }
  async function fingerprint(text) {
    const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
    return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  // -- the page that is shown without a connection

  if (document.querySelector("#no-connection")) setInterval(async () => {
    const answer = await fetch(worker, {cache: "no-store"}).catch(() => undefined);
    if (answer && answer.ok) location.reload();
  }, AGAIN_MS);
})();
