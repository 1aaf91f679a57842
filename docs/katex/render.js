// Arithmatex wraps a formula in an element of its own, between \( \) or \[ \].
document.querySelectorAll(".arithmatex").forEach((element) => {
  const text = element.textContent.trim();
  katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\[") });
});
