//! The report's plots, drawn by `plotters` as inline SVG.
//!
//! Colours are the style sheet's, so that a plot follows the reader's theme: each [`CLASSES`] entry has a stand-in colour
//! while it is drawn, and the class takes its place in the text. Bars are boxes of the page itself: their names wrap.

use anyhow::{Result, anyhow};
use minijinja::HtmlEscape;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// The canvas; places on it are whole numbers, so it is four times as fine as a phone's.
const CANVAS: (u32, u32) = (1600, 1080);
/// Height and width of a digit, about: labels only need to keep clear of each other.
const DIGIT: (i32, i32) = (48, 30);

/// What is drawn, by its class in the style sheet.
const CLASSES: [&str; 16] = [
    "grid",
    "tick",
    "axis",
    "label",
    "interval",
    "frontier",
    "baseline",
    "ideal",
    "front",
    "dominated",
    "below",
    "pick",
    "s0",
    "s1",
    "s0 few",
    "s1 few",
];

/// One plot.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Heading.
    pub title: String,
    /// Across.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// Lines through points; the first lies lowest.
    pub lines: Vec<Line>,
    /// Points, the most important last.
    pub marks: Vec<Mark>,
}

/// A line with its class.
#[derive(Clone, Debug)]
pub struct Line {
    /// One of [`CLASSES`].
    pub class: &'static str,
    /// What it goes through.
    pub points: Vec<(f64, f64)>,
}

/// A point.
#[derive(Clone, Debug)]
pub struct Mark {
    /// One of [`CLASSES`].
    pub class: &'static str,
    /// Where.
    pub at: (f64, f64),
    /// Radius on the canvas.
    pub r: i32,
    /// Ends of an interval of y.
    pub interval: Option<[f64; 2]>,
    /// A few digits beside it; may be empty.
    pub label: String,
    /// Shown when pointed at.
    pub tip: String,
}

/// The values of an axis.
#[derive(Clone, Debug)]
pub struct Axis {
    label: String,
    unit: &'static str,
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    /// From one value to another.
    pub fn new(label: &str, unit: &'static str, low: f64, high: f64) -> Axis {
        let (low, high) = if low < high { (low, high) } else { (low - 0.5, low + 0.5) };
        Axis { label: label.into(), unit, low, high, log: false }
    }

    /// Around values, with some air.
    pub fn around(label: &str, unit: &'static str, values: impl Iterator<Item = f64>) -> Axis {
        let (low, high) = ends(values).unwrap_or((0.0, 1.0));
        let air = 0.06 * (high - low);
        Axis::new(label, unit, low - air, high + air)
    }

    /// Around positive values, logarithmic.
    pub fn log(label: &str, values: impl Iterator<Item = f64>) -> Axis {
        let (low, high) = ends(values.filter(|x| *x > 0.0)).unwrap_or((0.1, 1.0));
        Axis { label: label.into(), unit: "", low: low / 1.5, high: high * 1.5, log: true }
    }

    /// Both ends.
    pub fn ends(&self) -> (f64, f64) {
        (self.low, self.high)
    }

    /// What is drawn evenly. A value off the axis is at its end.
    fn scale(&self, value: f64) -> f64 {
        let inside = if value.is_nan() { self.low } else { value.clamp(self.low, self.high) };
        if self.log { inside.ln() } else { inside }
    }

    /// Round numbers on the axis.
    fn ticks(&self) -> Vec<f64> {
        if !self.log {
            return RangedCoordf64::from(self.low..self.high).key_points(6);
        }
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let all = decades.flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d)));
        let within: Vec<f64> = all.filter(|v| (self.low..=self.high).contains(v)).collect();
        match within.len() {
            0..=7 => within,
            _ => within.into_iter().filter(|v| (v.log10() - v.log10().round()).abs() < 1e-9).collect(),
        }
    }

    /// A tick's number with the digits that tell it from its neighbours.
    fn text(&self, tick: f64) -> String {
        let smallest = match (self.log, &self.ticks()[..]) {
            (true, _) => tick,
            (false, [a, b, ..]) => b - a,
            (false, _) => self.high - self.low,
        };
        let decimals = (-smallest.log10().floor()).clamp(0.0, 4.0) as usize;
        format!("{tick:.decimals$}{}", self.unit)
    }
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let ends = self.scale(self.low)..self.scale(self.high);
        RangedCoordf64::from(ends).map(&self.scale(*value), limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { vec![] } else { self.ticks() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

fn ends(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let finite = values.filter(|x| x.is_finite());
    finite.fold(None, |ends, x| Some(ends.map_or((x, x), |(l, h): (f64, f64)| (l.min(x), h.max(x)))))
}

/// The stand-in of a class.
fn colour(class: &str) -> RGBColor {
    RGBColor(0, 0, CLASSES.iter().position(|c| *c == class).unwrap_or_default() as u8)
}

impl Plot {
    /// Inline SVG as wide as its place on the page.
    pub fn svg(&self) -> Result<String> {
        let mut svg = String::new();
        self.draw(SVGBackend::with_string(&mut svg, CANVAS)).map_err(|e| anyhow!("plot `{}`: {e}", self.title))?;
        for (i, class) in CLASSES.iter().enumerate() {
            for what in ["fill", "stroke"] {
                svg = svg.replace(&format!("{what}=\"#0000{i:02X}\""), &format!("class=\"{class}\""));
            }
        }
        // The first line has the size in pixels and a name space that HTML knows; circles are those of the marks.
        let (_, body) = svg.split_once('\n').unwrap_or_default();
        let mut parts = body.split("<circle");
        let mut text = format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">{}",
            CANVAS.0,
            CANVAS.1,
            HtmlEscape(&self.title),
            parts.next().unwrap_or_default()
        );
        for (part, mark) in parts.zip(&self.marks) {
            let tip = format!("><title>{}</title></circle>", HtmlEscape(&mark.tip));
            text += "<circle";
            text += &part.replacen("/>", &tip, 1);
        }
        Ok(text)
    }

    fn draw(&self, backend: SVGBackend) -> Result<(), Box<dyn std::error::Error + '_>> {
        let root = backend.into_drawing_area();
        let style = |class: &str| ("sans-serif", DIGIT.0).into_font().color(&colour(class));
        let mut chart = ChartBuilder::on(&root)
            .margin(24)
            .margin_top(44)
            .margin_right(48)
            .x_label_area_size(150)
            .y_label_area_size(210)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .axis_style(TRANSPARENT)
            .bold_line_style(colour("grid").stroke_width(4))
            .label_style(style("tick"))
            .axis_desc_style(style("axis"))
            .x_desc(&self.x.label)
            .y_desc(&self.y.label)
            .x_label_formatter(&|at| self.x.text(*at))
            .y_label_formatter(&|at| self.y.text(*at))
            .draw()?;
        for line in &self.lines {
            let points = line.points.iter().copied();
            chart.draw_series(LineSeries::new(points, colour(line.class).stroke_width(7)))?;
        }
        for m in &self.marks {
            if let Some(ends) = m.interval {
                let points = ends.map(|y| (m.at.0, y));
                chart.draw_series(LineSeries::new(points, colour("interval").stroke_width(5)))?;
            }
        }
        chart.draw_series(self.marks.iter().map(|m| Circle::new(m.at, m.r, colour(m.class).filled())))?;
        let middle = style("label").pos(Pos::new(HPos::Center, VPos::Center));
        let places: Vec<_> = self.marks.iter().map(|m| chart.backend_coord(&m.at)).collect();
        for (m, at) in self.marks.iter().zip(labels(&self.marks, &places)) {
            if let Some(at) = at {
                root.draw_text(&m.label, &middle, at)?;
            }
        }
        root.present()?;
        Ok(())
    }
}

/// Where labels stand, the most important mark's first: beside their points, clear of each other and of every point;
/// a label without such a place is left out.
fn labels(marks: &[Mark], places: &[(i32, i32)]) -> Vec<Option<(i32, i32)>> {
    let points = marks.iter().zip(places).map(|(m, at)| (*at, (m.r, m.r)));
    let mut taken: Vec<((i32, i32), (i32, i32))> = points.collect();
    let mut found = vec![None; marks.len()];
    for (i, (m, (x, y))) in marks.iter().zip(places).enumerate().rev() {
        let half = (DIGIT.1 * m.label.chars().count() as i32 / 2, DIGIT.0 / 2);
        let (dx, dy) = (m.r + half.0 + 6, m.r + half.1 + 2);
        let around = [(dx, 0), (0, -dy), (-dx, 0), (0, dy), (dx, -dy), (-dx, -dy), (dx, dy), (-dx, dy)];
        let clear = |(a, b): (i32, i32)| {
            let inside = a > half.0 && a < CANVAS.0 as i32 - half.0 && b > half.1 && b < CANVAS.1 as i32 - half.1;
            let apart = |((c, d), other): &((i32, i32), (i32, i32))| {
                (a - c).abs() >= half.0 + other.0 || (b - d).abs() >= half.1 + other.1
            };
            inside && taken.iter().all(apart)
        };
        let best = around.iter().map(|(dx, dy)| (x + dx, y + dy)).find(|at| clear(*at));
        if let Some(at) = best.filter(|_| !m.label.is_empty()) {
            taken.push((at, half));
            found[i] = Some(at);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(at: (f64, f64), label: &str) -> Mark {
        Mark { class: "front", at, r: 20, interval: Some([0.0, 1.0]), label: label.into(), tip: "<&\">".into() }
    }

    #[test]
    fn ticks_are_round_and_few() {
        let texts = |axis: Axis| axis.ticks().into_iter().map(|t| axis.text(t)).collect::<Vec<_>>();
        assert_eq!(texts(Axis::new("", "%", 90.1, 94.2)), ["91%", "92%", "93%", "94%"]);
        assert_eq!(texts(Axis::new("", "", 0.0, 1.0)), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(texts(Axis::log("", [0.5, 9.0].into_iter())), ["0.5", "1", "2", "5", "10"]);
        for axis in
            [Axis::new("", "", 1.0, 1.0), Axis::log("", [1.0].into_iter()), Axis::log("", [1e-3, 1e5].into_iter())]
        {
            assert!((1..=12).contains(&axis.ticks().len()), "{axis:?}");
        }
    }

    #[test]
    fn a_plot_has_the_pages_classes_and_no_colour() {
        let plot = Plot {
            title: "<b>".into(),
            x: Axis::log("ms", [0.5, 9.0, f64::NAN, -1.0].into_iter()),
            y: Axis::around("%", "%", [0.0, 1.0].into_iter()),
            lines: vec![Line { class: "frontier", points: vec![(1.0, 0.0), (f64::NAN, 2.0)] }],
            marks: vec![mark((1.0, 0.5), "7"), mark((-3.0, f64::INFINITY), "")],
        };
        let svg = plot.svg().expect("a plot");
        assert!(!svg.contains('#') && !svg.contains("NaN") && !svg.contains("http"), "{svg}");
        assert!(svg.contains("aria-label=\"&lt;b&gt;\"") && svg.matches("<title>&lt;&amp;").count() == 2, "{svg}");
        for class in ["grid", "tick", "axis", "label", "interval", "frontier", "front"] {
            assert!(svg.contains(&format!("class=\"{class}\"")), "{class}: {svg}");
        }
    }

    #[test]
    fn labels_keep_clear_of_each_other_and_of_points() {
        let at = [(800, 500), (830, 505), (860, 500), (800, 500), (1590, 10)];
        let marks = vec![mark((0.0, 0.0), "12"); at.len()];
        let found = labels(&marks, &at);
        assert!(found[4].is_some() && found.iter().flatten().count() >= 4, "{found:?}");
        for (i, a) in found.iter().enumerate().filter_map(|(i, a)| Some((i, (*a)?))) {
            for b in found.iter().skip(i + 1).flatten() {
                assert!((a.0 - b.0).abs() >= 2 * DIGIT.1 || (a.1 - b.1).abs() >= DIGIT.0, "{a:?} {b:?}");
            }
            for b in at {
                assert!((a.0 - b.0).abs() >= DIGIT.1 + 20 || (a.1 - b.1).abs() >= DIGIT.0 / 2 + 20, "{a:?} {b:?}");
            }
        }
    }
}
