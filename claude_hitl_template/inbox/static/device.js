"use strict";
// What the pages have in common with an installed application: the service worker, and the count on the icon.
(() => {
  const {worker, base} = document.body.dataset;
  if (navigator.serviceWorker) {
    navigator.serviceWorker.register(worker, {scope: `${base}/`}).catch((error) => console.warn("The service worker was not installed:", error));
  }
  document.addEventListener("hitl:count", ({detail: count}) => setBadge(count));
  function setBadge(count) {
    const shown = count ? navigator.setAppBadge && navigator.setAppBadge(count) : navigator.clearAppBadge && navigator.clearAppBadge();
    if (shown) shown.catch(() => undefined); // not installed, so there is no icon
  }
  if (!document.querySelector(".who, #no-connection")) setBadge(0); // no one is signed in
  if (document.querySelector("#no-connection")) addEventListener("online", () => location.reload());
})();
