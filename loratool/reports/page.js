// A click on the head of a column sorts its table; without this the page is the same.
for (const table of document.querySelectorAll("table.rows")) {
  table.querySelectorAll("thead th").forEach((head, index) => {
    let rising = false;
    head.addEventListener("click", () => {
      rising = !rising;
      const key = (row) => (row.cells[index] ? row.cells[index].textContent.trim() : "");
      const number = (text) => parseFloat(text.replace(/,/g, ""));
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => row.cells.length > 1);
        rows.sort((a, b) => {
          const [one, other] = [key(a), key(b)];
          const gap = number(one) - number(other);
          const order = Number.isNaN(gap) ? one.localeCompare(other) : gap;
          return rising ? order : -order;
        });
        body.append(...rows);
      }
    });
  });
}
