//! Geometry of the report's plots: data to places on a 400 x 270 canvas. The template draws, so that texts are escaped
//! and colours chosen in one place.

use serde::Serialize;

/// The canvas, and the frame of the plot in it. Units are those of the SVG's viewBox, about a pixel on a phone.
const LEFT: f64 = 52.0;
const RIGHT: f64 = 388.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 226.0;
/// Height of a label's line.
const LINE: f64 = 13.0;
/// Width of a letter, roughly: labels only need not to leave the canvas.
const LETTER: f64 = 6.4;

/// One plot, ready to draw.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Plot {
    /// Heading.
    pub title: String,
    /// Below the x axis.
    pub x_label: String,
    /// Above the y axis.
    pub y_label: String,
    /// Grid lines across.
    pub x_ticks: Vec<Tick>,
    /// Grid lines along.
    pub y_ticks: Vec<Tick>,
    /// Polylines.
    pub lines: Vec<Line>,
    /// Points.
    pub marks: Vec<Mark>,
}

/// A grid line with its number.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tick {
    /// Place along the axis.
    pub at: f64,
    /// The number.
    pub text: String,
}

/// A polyline.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Class in the style sheet.
    pub class: &'static str,
    /// `x,y x,y ...`
    pub points: String,
}

/// A point, perhaps with a label and an interval.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    /// Class in the style sheet.
    pub class: &'static str,
    /// Place.
    pub x: f64,
    /// Place.
    pub y: f64,
    /// Radius.
    pub r: f64,
    /// Ends of the vertical interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// Beside the point; may be empty.
    pub label: String,
    /// Place of the label.
    pub label_x: f64,
    /// Place of the label.
    pub label_y: f64,
    /// `start` or `end`.
    pub anchor: &'static str,
    /// Shown when pointed at.
    pub tip: String,
}

/// How an axis maps values.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    /// Left to right. A logarithmic axis needs positive values.
    pub fn x(low: f64, high: f64, log: bool) -> Axis {
        Axis::new(low, high, log, LEFT, RIGHT)
    }

    /// Bottom to top.
    pub fn y(low: f64, high: f64, log: bool) -> Axis {
        Axis::new(low, high, log, BOTTOM, TOP)
    }

    fn new(low: f64, high: f64, log: bool, from: f64, to: f64) -> Axis {
        let (low, high) = match (low < high, log) {
            (true, _) => (low, high),
            (false, true) => (low / 2.0, low * 2.0),
            (false, false) => (low - 0.5, low + 0.5),
        };
        Axis { low, high, log, from, to }
    }

    /// The axis around values, with some air.
    pub fn around(values: impl Iterator<Item = f64>, log: bool, make: fn(f64, f64, bool) -> Axis) -> Axis {
        let (low, high) = values
            .filter(|x| x.is_finite() && (!log || *x > 0.0))
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
        if low > high {
            return make(if log { 0.1 } else { 0.0 }, 1.0, log);
        }
        match log {
            true => make(low / 1.4, high * 1.4, true),
            false => {
                let air = 0.06 * (high - low).max(1e-9);
                make(low - air, high + air, false)
            }
        }
    }

    /// Both ends.
    pub fn ends(&self) -> (f64, f64) {
        (self.low, self.high)
    }

    /// The place of a value.
    pub fn at(&self, value: f64) -> f64 {
        let f = |x: f64| if self.log { x.max(f64::MIN_POSITIVE).ln() } else { x };
        let share = (f(value) - f(self.low)) / (f(self.high) - f(self.low));
        let share = if share.is_finite() { share.clamp(-0.02, 1.02) } else { 0.0 };
        (10.0 * (self.from + share * (self.to - self.from))).round() / 10.0
    }

    /// Round numbers within, each printed with what it needs and `unit`.
    pub fn ticks(&self, unit: &str) -> Vec<Tick> {
        let values: Vec<f64> = if self.log {
            let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let all: Vec<f64> = decades.flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d))).collect();
            let within: Vec<f64> = all.into_iter().filter(|v| (self.low..=self.high).contains(v)).collect();
            match within.len() {
                0..=7 => within,
                _ => within.into_iter().filter(|v| (v.log10() - v.log10().round()).abs() < 1e-9).collect(),
            }
        } else {
            let step = round_step((self.high - self.low) / 5.0);
            let first = (self.low / step).ceil() as i64;
            (first..first + 20).map(|i| i as f64 * step).take_while(|v| *v <= self.high).collect()
        };
        let smallest = match self.log {
            true => self.low,
            false => values.get(1).map_or(1.0, |v| v - values[0]),
        };
        let decimals = (-smallest.log10().floor()).clamp(0.0, 4.0) as usize;
        let text = |v: f64| {
            let number = format!("{v:.decimals$}");
            let number = match self.log && number.contains('.') {
                true => number.trim_end_matches('0').trim_end_matches('.').to_string(),
                false => number,
            };
            format!("{number}{unit}")
        };
        values.into_iter().map(|v| Tick { at: self.at(v), text: text(v) }).collect()
    }
}

/// 1, 2 or 5 times a power of ten, at least `step`.
fn round_step(step: f64) -> f64 {
    let ten = 10f64.powf(step.log10().floor());
    let m = [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * ten >= step * 0.999).unwrap_or(10.0);
    m * ten
}

/// A polyline through values.
pub fn line(class: &'static str, x: &Axis, y: &Axis, points: impl IntoIterator<Item = (f64, f64)>) -> Line {
    let points = points.into_iter().map(|(a, b)| format!("{},{}", x.at(a), y.at(b)));
    Line { class, points: points.collect::<Vec<_>>().join(" ") }
}

/// A point without label.
pub fn mark(class: &'static str, x: f64, y: f64, r: f64, tip: String) -> Mark {
    Mark { class, x, y, r, interval: None, label: String::new(), label_x: x, label_y: y, anchor: "start", tip }
}

/// A box that a label may not lie on: x from, x to, y of the middle, height.
type Taken = [f64; 4];

/// Puts labels beside their points: to the right where there is room, apart from each other and from other points.
pub fn place_labels(marks: &mut [Mark]) {
    let mut order: Vec<usize> = (0..marks.len()).collect();
    order.sort_by(|&a, &b| marks[a].y.total_cmp(&marks[b].y));
    let points: Vec<Taken> = marks.iter().map(|m| [m.x - m.r, m.x + m.r, m.y, 2.0 * m.r]).collect();
    let mut labels: Vec<Taken> = vec![];
    for i in order {
        let m = &mut marks[i];
        m.label = m.label.chars().take(24).collect();
        let width = LETTER * m.label.chars().count() as f64;
        let sides = [("start", m.x + 9.0, m.x + 9.0), ("end", m.x - 9.0, m.x - 9.0 - width)];
        let fits = |from: f64| from >= 0.0 && from + width <= RIGHT + 8.0;
        let heights = [0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0].map(|n| m.y + n * LINE * 0.6);
        let places: Vec<_> = heights
            .into_iter()
            .filter(|y| *y > TOP + 4.0 && *y < BOTTOM - 4.0)
            .flat_map(|y| sides.iter().filter(|s| fits(s.2)).map(move |s| (*s, y)))
            .collect();
        let clear = |taken: &[Taken], from: f64, y: f64| {
            !taken.iter().any(|t| t[0] < from + width && from < t[1] && (t[2] - y).abs() < 0.5 * (LINE + t[3]))
        };
        let best = places.iter().find(|(s, y)| clear(&labels, s.2, *y) && clear(&points, s.2, *y));
        let best = best.or_else(|| places.iter().find(|(s, y)| clear(&labels, s.2, *y)));
        let ((anchor, x, from), y) = best.copied().unwrap_or((sides[0], m.y));
        // Letters stand on their line: the middle is above it.
        (m.anchor, m.label_x, m.label_y) = (anchor, x, y + 4.0);
        labels.push([from, from + width, y, LINE]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        let texts = |axis: Axis, unit| axis.ticks(unit).into_iter().map(|t| t.text).collect::<Vec<_>>();
        assert_eq!(texts(Axis::y(90.1, 94.2, false), "%"), ["91%", "92%", "93%", "94%"]);
        assert_eq!(texts(Axis::x(0.0, 1.0, false), ""), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(texts(Axis::x(0.35, 14.0, true), ""), ["0.5", "1", "2", "5", "10"]);
        for (low, high, log) in [(1.0, 1.0, false), (1.0, 1.0, true), (0.0, 1e-9, false), (1e-3, 1e5, true)] {
            let n = Axis::x(low, high, log).ticks("").len();
            assert!((1..=12).contains(&n), "{low} {high} {log}: {n}");
        }
    }

    #[test]
    fn labels_keep_clear_of_each_other_and_of_points() {
        let at = |x, y, name: &str| Mark { label: name.into(), ..mark("front", x, y, 5.0, String::new()) };
        let mut marks =
            vec![at(300.0, 100.0, "first"), at(320.0, 102.0, "second"), at(385.0, 104.0, "third-of-them")];
        place_labels(&mut marks);
        let boxes: Vec<[f64; 2]> = (marks.iter())
            .map(|m| {
                let width = LETTER * m.label.len() as f64;
                if m.anchor == "start" { [m.label_x, m.label_x + width] } else { [m.label_x - width, m.label_x] }
            })
            .collect();
        for (i, m) in marks.iter().enumerate() {
            assert!(boxes[i][0] >= 0.0 && boxes[i][1] <= 400.0, "{}: on the canvas", m.label);
            for (j, o) in marks.iter().enumerate().filter(|(j, _)| *j != i) {
                let beside = |from: f64, to: f64| boxes[i][1] <= from || to <= boxes[i][0];
                let apart = (m.label_y - o.label_y).abs() >= LINE || beside(boxes[j][0], boxes[j][1]);
                let off = (m.label_y - 4.0 - o.y).abs() >= 0.5 * LINE + o.r || beside(o.x - o.r, o.x + o.r);
                assert!(apart && off, "{} and {}: {marks:?}", m.label, o.label);
            }
        }
    }

    #[test]
    fn odd_values_stay_on_the_canvas() {
        let axis = Axis::around([f64::NAN, 3.0, -1.0].into_iter(), true, Axis::x);
        for value in [f64::NAN, -1.0, 0.0, 3.0, f64::INFINITY] {
            let at = axis.at(value);
            assert!((0.0..=400.0).contains(&at), "{value}: {at}");
        }
        Axis::around(std::iter::empty(), false, Axis::y).at(1.0);
    }
}
