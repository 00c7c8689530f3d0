'use strict';
// Charts: a line that follows the pointer (or the arrow keys) and the values under it, in the legend.
for (const figure of document.querySelectorAll('.chart')) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector('svg');
  const cursor = figure.querySelector('.cursor');
  const at = figure.querySelector('.at');
  const outputs = [...figure.querySelectorAll('output')];
  const latest = outputs.map((output) => output.textContent);
  let index = -1;

  const clear = () => {
    index = -1;
    figure.classList.remove('reading');
    at.textContent = 'last';
    outputs.forEach((output, i) => { output.textContent = latest[i]; });
  };
  const read = (i) => {
    index = Math.max(0, Math.min(data.x.length - 1, i));
    figure.classList.add('reading');
    cursor.setAttribute('x1', data.x[index]);
    cursor.setAttribute('x2', data.x[index]);
    at.textContent = 'step ' + data.step[index];
    outputs.forEach((output, i) => { output.textContent = data.text[i][index]; });
  };
  const nearest = (event) => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
    let best = 0;
    data.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(data.x[best] - x)) best = i; });
    read(best);
  };
  svg.addEventListener('pointermove', nearest);
  svg.addEventListener('pointerdown', nearest);
  svg.addEventListener('pointerleave', clear);
  svg.addEventListener('blur', clear);
  svg.addEventListener('keydown', (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (event.key in moves) {
      event.preventDefault();
      read(index < 0 ? (event.key === 'ArrowRight' || event.key === 'Home' ? 0 : data.x.length - 1) : index + moves[event.key]);
    } else if (event.key === 'Escape') {
      clear();
    }
  });
}

// Episodes: filters by evaluation and by outcome.
const wanted = { stage: '', outcome: '' };
const episodes = [...document.querySelectorAll('.episode')];
const cards = [...document.querySelectorAll('.card')];
const shown = document.getElementById('shown');
const apply = () => {
  let count = 0;
  for (const episode of episodes) {
    episode.hidden = ['stage', 'outcome'].some((key) => wanted[key] && episode.dataset[key] !== wanted[key]);
    count += episode.hidden ? 0 : 1;
  }
  for (const card of cards) card.hidden = !card.querySelector('.episode:not([hidden])');
  if (shown) shown.textContent = count + ' of ' + episodes.length + ' episodes';
};
for (const group of document.querySelectorAll('[data-filter]')) {
  group.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (!button) return;
    wanted[group.dataset.filter] = button.dataset.value;
    for (const other of group.querySelectorAll('button')) other.setAttribute('aria-pressed', String(other === button));
    apply();
  });
}
const unfold = document.getElementById('unfold');
if (unfold) {
  unfold.addEventListener('click', () => {
    const open = unfold.textContent === 'open all';
    for (const card of cards) card.open = open;
    unfold.textContent = open ? 'close all' : 'open all';
  });
}
apply();
