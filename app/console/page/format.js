// Numbers as people read them. What is not known is a dash.

export const NONE = "–";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const precise = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });

export function count(value) {
  return value === null || value === undefined ? NONE : whole.format(value);
}

/** A rate a second: two digits while it is small. */
export function rate(value) {
  if (value === null || value === undefined) return NONE;
  return value < 10 ? precise.format(value) : whole.format(value);
}

/** A span in seconds, in the unit that suits it. */
export function span(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 0.0995) return `${whole.format(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${Number.isInteger(seconds) ? seconds : seconds.toFixed(2)} s`;
  if (seconds < 90) return `${whole.format(seconds)} s`;
  if (seconds < 5400) return `${whole.format(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${whole.format(seconds / 3600)} h`;
  return `${whole.format(seconds / 86400)} d`;
}

export function bytes(value) {
  const unit = value < 2 ** 30 ? "MiB" : "GiB";
  const size = value / (unit === "MiB" ? 2 ** 20 : 2 ** 30);
  return `${(size < 10 ? precise : whole).format(size)} ${unit}`;
}

export function share(value) {
  return value === null || value === undefined ? NONE : `${whole.format(value * 100)} %`;
}

export function words(...parts) {
  return parts.filter(Boolean).join("\u00a0· ");
}
