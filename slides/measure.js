// Runs in the page of a deck, all slides laid out as for print: {title, problems} of each slide.
// A slide's box is its section without its padding; the source in the footer stands below it.
() => [...document.querySelectorAll("section")].map((section) => {
  const problems = [], box = section.getBoundingClientRect(), style = getComputedStyle(section)
  const scale = box.width / section.offsetWidth
  const title = section.querySelector("h1, h2")?.textContent ?? ""
  if (section.scrollHeight > section.clientHeight + 1 || section.scrollWidth > section.clientWidth + 1)
    problems.push(`needs ${section.scrollWidth} x ${section.scrollHeight} px, has ${section.clientWidth} x ${section.clientHeight}`)
  const room = {
    left: box.left + scale * parseFloat(style.paddingLeft), right: box.right - scale * parseFloat(style.paddingRight),
    top: box.top + scale * parseFloat(style.paddingTop), bottom: box.bottom - scale * parseFloat(style.paddingBottom),
  }
  for (const child of section.querySelectorAll("*")) {
    if (child.closest("footer, svg, mjx-container")) continue
    const r = child.getBoundingClientRect()
    const over = Math.max(room.left - r.left, r.right - room.right, room.top - r.top, r.bottom - room.bottom) / scale
    if (over > 1.5) { problems.push(`<${child.tagName.toLowerCase()}> is ${Math.round(over)} px beyond the slide's box`); break }
    if (child.scrollWidth > child.clientWidth + 1 && child.clientWidth > 0 && getComputedStyle(child).display !== "inline")
      problems.push(`<${child.tagName.toLowerCase()}> is wider than its box`)
  }
  for (const mjx of section.querySelectorAll("mjx-container, mjx-container svg")) {
    const r = mjx.getBoundingClientRect()
    if (r.right > room.right + 2 || r.bottom > room.bottom + 2) problems.push("a formula leaves the slide's box")
  }
  const footer = section.querySelector("footer")
  if (footer && footer.getBoundingClientRect().height / scale > 46) problems.push("the source has more than two lines")
  for (const image of section.querySelectorAll("img")) {
    if (!image.complete || image.naturalWidth === 0) { problems.push(`a figure is not loaded: ${image.alt}`); continue }
    if (!image.alt) problems.push("a figure has no description")
    const r = image.getBoundingClientRect()
    const grown = Math.min(r.width / image.naturalWidth, r.height / image.naturalHeight) / scale
    if (grown < 0.95) problems.push(`a figure has too little room: ${grown.toFixed(2)} of its size`)
  }
  return {title, problems}
})
