"""The script of a report: the slider over each pair, and votes that are cast blind."""

# Sides are swapped as the page says (`data-left`, fixed by a seed), and names, scores and alternative texts are taken away. The
# interval over the votes is Wilson's with Student's t, as in intervals.py; the page brings the quantiles along.
SCRIPT = """
(() => {
  const section = document.getElementById('sample');
  if (!section) return;
  const find = name => document.getElementById(name);
  const [slide, blind, save, tally] = ['slide', 'blind', 'save', 'tally'].map(find);
  const pairs = [...section.querySelectorAll('.pair')], about = JSON.parse(section.dataset.about);
  const idle = blind.textContent, body = document.body.classList;
  const all = name => [...document.querySelectorAll(name)];
  let votes = [];
  slide.hidden = blind.hidden = false;

  const setSlide = on => {
    body.toggle('slide', on);
    slide.setAttribute('aria-pressed', on);
    all('.slider').forEach(slider => { slider.hidden = !on; });
  };
  slide.addEventListener('click', () => setSlide(!body.contains('slide')));
  all('.slider').forEach(slider => slider.addEventListener('input', () => {
    slider.parentElement.style.setProperty('--cut', slider.value + '%');
  }));

  const percent = share => (100 * share).toFixed(1) + '%';
  const interval = (wins, ties, losses) => {
    const n = wins + ties + losses, rate = (wins + ties / 2) / n, z = about.quantiles[n - 1];
    if (z === null) return [0, 1];
    const smooth = (n * rate + 1) / (n + 2), square = x => x * x;
    const spread = wins * square(1 - smooth) + ties * square(0.5 - smooth) + losses * square(smooth)
      + square(smooth) + square(1 - smooth);
    const m = n * smooth * (1 - smooth) / (spread / (n + 2)), scale = 1 + z * z / m;
    const centre = (rate + z * z / (2 * m)) / scale;
    const half = z / scale * Math.sqrt(rate * (1 - rate) / m + z * z / (4 * m * m));
    return [Math.max(0, centre - half), Math.min(1, centre + half)];
  };
  const counted = () => {
    const won = side => votes.filter(vote => vote.preferred === side).length;
    const [wins, ties, losses] = ['aligned', 'tie', 'base'].map(won), cast = wins + ties + losses;
    if (!cast) return null;
    const [low, high] = interval(wins, ties, losses);
    return { wins, ties, losses, rate: (wins + ties / 2) / cast, low, high, confidence: 0.95 };
  };
  const dress = judging => {
    body.toggle('blind', judging);
    slide.hidden = judging;
    pairs.forEach(pair => {
      const pictures = pair.querySelector('.pictures'), left = judging ? pair.dataset.left : 'base';
      pictures.prepend(pictures.querySelector(`[data-side=${left}]`));
      pictures.querySelectorAll('img').forEach((image, at) => {
        image.dataset.alt ||= image.alt;
        image.alt = judging ? ['left picture', 'right picture'][at] : image.dataset.alt;
      });
      const buttons = pair.querySelector('.votes');
      buttons.hidden = !judging;
      buttons.querySelectorAll('button').forEach(button => button.setAttribute('aria-pressed', false));
    });
  };
  const stop = () => {
    dress(false);
    blind.textContent = idle;
    const found = counted();
    save.hidden = !found;
    tally.textContent = !found ? '' : `You preferred ${about.aligned_label} in ${found.wins} pairs and ${about.base_label} in `
      + `${found.losses}, with ${found.ties} ties: ${percent(found.rate)} for ${about.aligned_label} `
      + `(95% interval ${percent(found.low)} to ${percent(found.high)}), by one person's eyes.`;
  };
  blind.addEventListener('click', () => {
    if (body.contains('blind')) { stop(); return; }
    votes = [];
    setSlide(false);
    dress(true);
    save.hidden = true;
    blind.textContent = 'Show the result';
    tally.textContent = `Which picture do you prefer? 0 of ${pairs.length} judged.`;
  });
  pairs.forEach((pair, at) => pair.querySelectorAll('.votes button').forEach(button => button.addEventListener('click', () => {
    const left = pair.dataset.left, right = left === 'base' ? 'aligned' : 'base', vote = button.dataset.vote;
    const preferred = { left, tie: 'tie', right }[vote];
    votes[at] = { prompt: pair.querySelector('.prompt').textContent, seed: Number(pair.dataset.seed), left, vote, preferred };
    pair.querySelectorAll('.votes button').forEach(other => other.setAttribute('aria-pressed', other === button));
    tally.textContent = `Which picture do you prefer? ${votes.filter(Boolean).length} of ${pairs.length} judged.`;
  })));
  save.addEventListener('click', () => {
    const { quantiles, ...sides } = about, cast = votes.filter(Boolean);
    const content = JSON.stringify({ ...sides, result: counted(), votes: cast }, null, 1);
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([content], { type: 'application/json' }));
    link.download = 'votes.json';
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
"""
