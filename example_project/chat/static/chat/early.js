// Before the modules have loaded a message is only noted; the composer sends it then.
(() => {
  const note = (event) => {
    if (event.defaultPrevented || event.isComposing) return;
    const sends = event.type === "submit" || (event.key === "Enter" && !event.shiftKey);
    if (!sends || !event.target.matches("#form, #prompt")) return;
    event.preventDefault();
    document.getElementById("form").dataset.asked = document.getElementById("prompt").value;
  };
  document.addEventListener("submit", note);
  document.addEventListener("keydown", note);
})();
