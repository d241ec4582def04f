"use strict";

// Comforts of a session's page; all of it can be read without them.
document.addEventListener("DOMContentLoaded", () => {
  const transcript = document.querySelector(".as-transcript");
  for (const button of document.querySelectorAll("[data-fold]")) {
    button.closest("p").hidden = false;
    button.addEventListener("click", () => {
      for (const details of transcript.querySelectorAll("details")) {
        details.open = button.dataset.fold === "open";
      }
    });
  }

  // Only pages that came over https, or from this machine, have a clipboard.
  for (const button of navigator.clipboard ? document.querySelectorAll("[data-copy]") : []) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = button.dataset.done;
    });
  }
});
