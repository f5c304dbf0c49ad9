// Light or dark: what the browser says, unless somebody has chosen here. It runs before anything is painted.
{
  const root = document.documentElement;
  let chosen = "";
  try {
    chosen = localStorage.getItem("adapterpack-theme") ?? "";
  } catch {
    // No storage here: the choice lasts as long as the page.
  }

  function choose(theme) {
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
  }

  choose(chosen);
  addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("theme");
    select.value = chosen;
    select.addEventListener("change", () => {
      choose(select.value);
      try {
        localStorage.setItem("adapterpack-theme", select.value);
      } catch {
        // As above.
      }
    });
  });
}
