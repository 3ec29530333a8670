//! The end of a search: every trained shape worth it is stored in every way, timed, and what nothing beats is measured
//! on the test data, once.

use super::Search;
use super::trial::{self, Status, Trial};
use crate::commands::Speed;
use crate::recipe::{Kind, SearchFile};
use crate::settings::{Compare, Data, Prune, Quantize, Vocab};
use crate::ui::{duration, mb, percent};
use crate::work::compare::{self, Chosen, Comparison, Plan};
use crate::work::machine::{self, Machine};
use crate::work::pareto::{front, hypervolume, select};
use crate::work::report::Lang;
use crate::work::{pretty, round};
use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use quetsch::atomic::write_file;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A model that was measured.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Point {
    /// Shape, `v` for a smaller vocabulary, and the way its weights are stored.
    pub name: String,
    /// Its folder.
    pub dir: PathBuf,
    /// On the validation part.
    pub validation_accuracy: f64,
    /// Multiply-accumulates of one sentence.
    pub macs: f64,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of the weights' files.
    pub disk_bytes: u64,
    /// Whether no other point is at least as good in accuracy, latency, size and memory, and better in one.
    pub front: bool,
    /// Whether its accuracy is below the baseline's.
    pub below_baseline: bool,
    /// In a process of its own.
    #[serde(flatten)]
    pub speed: Speed,
}

/// What a finished search adds to `search.json`.
#[derive(Serialize, JsonSchema)]
pub struct Outcome<'a> {
    /// Program and version.
    tool: &'static str,
    /// Where it was measured.
    machine: Machine,
    /// Threads of all trials together.
    threads: usize,
    /// Trials at a time.
    jobs: usize,
    /// The search file with nothing left open.
    #[schemars(with = "Value")]
    search: &'a SearchFile,
    /// The teacher's accuracy on the validation part.
    teacher_validation_accuracy: f64,
    /// The TF-IDF baseline's.
    baseline_validation_accuracy: f64,
    /// Points that the recommended model may lose against the teacher.
    max_drop: f64,
    /// Name of the recommended point; none if every one loses too much or is below the baseline.
    recommended: Option<String>,
    /// Beyond the teacher and the baseline.
    hypervolume: Hypervolume,
    /// The models that were timed, the teacher first.
    points: &'a [Point],
    /// Accuracy on the test data by name.
    test_accuracy: BTreeMap<&'a str, f64>,
}

/// Areas that the points dominate.
#[derive(Serialize, JsonSchema)]
struct Hypervolume {
    /// Points of accuracy times doublings of speed.
    latency: f64,
    /// Points of accuracy times halvings of size.
    size: f64,
}

/// What a search found: `search.json`.
pub struct Found(pub Value);

impl Found {
    /// As it was written.
    pub fn read(path: &Path) -> Result<Found> {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Found(serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?))
    }

    /// The points that nothing beats, for a terminal.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        let header = ["point", "validation", "test", "p50 ms", "disk MB", "RSS MB", ""];
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header);
        let number = |v: &Value, decimals: usize| v.as_f64().map_or("-".into(), |x| format!("{x:.decimals$}"));
        let share = |v: &Value| v.as_f64().map_or("-".into(), percent);
        let recommended = &self.0["recommended"];
        for p in self.0["points"].as_array().into_iter().flatten() {
            if p["front"] != true && &p["name"] != recommended {
                continue;
            }
            let name = p["name"].as_str().unwrap_or_default();
            let note = match (&p["name"] == recommended, p["below_baseline"] == true) {
                (true, _) => "recommended",
                (_, true) => "below TF-IDF",
                _ => "",
            };
            table.add_row([
                name.to_string(),
                share(&p["validation_accuracy"]),
                share(&self.0["test_accuracy"][name]),
                number(&p["latency_ms"]["p50"], 3),
                number(&json!(p["disk_bytes"].as_f64().map(|b| b / 1e6)), 1),
                number(&p["peak_rss_mb"], 1),
                note.into(),
            ]);
        }
        for column in table.column_iter_mut().skip(1).take(5) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }

    /// What came out, in words.
    pub fn summary(&self) -> String {
        let r = &self.0;
        let count = |status: &str| {
            let trials = r["trials"].as_array().into_iter().flatten();
            trials.filter(|t| t["status"] == status || t["status"].get(status).is_some()).count()
        };
        let points = r["points"].as_array().map_or(0, Vec::len);
        let on_front = r["points"].as_array().into_iter().flatten().filter(|p| p["front"] == true).count();
        let mut text = format!(
            "{} trials done, {} failed, {} left out for want of time; {points} models measured, {on_front} of them beaten \
             by none; {}\nhypervolume over teacher and TF-IDF: {:.2} points x doublings of speed, {:.2} points x halvings \
             of size",
            count("done"),
            count("failed"),
            count("out_of_time"),
            duration(r["seconds"].as_f64().unwrap_or(0.0)),
            r["hypervolume"]["latency"].as_f64().unwrap_or(0.0),
            r["hypervolume"]["size"].as_f64().unwrap_or(0.0),
        );
        let drop = r["max_drop"].as_f64().unwrap_or(0.0);
        text += &match r["recommended"].as_str() {
            Some(name) => format!("\nrecommended within {drop} points of the teacher: {name}"),
            None => format!(
                "\nnone is recommended: on the validation part no smaller model stays within {drop} points of the teacher \
                 and above TF-IDF ({})",
                percent(r["baseline_validation_accuracy"].as_f64().unwrap_or(0.0))
            ),
        };
        text
    }
}

/// A model that may become a point.
struct Candidate {
    name: String,
    trial: usize,
    storing: usize,
}

impl Search<'_> {
    /// From the last trial of every shape to the result.
    pub(super) fn finish(&mut self, teacher: usize, finals: Vec<usize>) -> Result<Found> {
        let candidates = self.stored(teacher, finals)?;
        let points = self.measure(candidates)?;
        self.conclude(teacher, points)
    }

    /// Every shape that no other beats, with every vocabulary, in every way of storing.
    fn stored(&mut self, teacher: usize, finals: Vec<usize>) -> Result<Vec<Candidate>> {
        let all: Vec<usize> = std::iter::once(teacher).chain(finals).collect();
        let costs = |t: &Trial| ([t.macs, t.parameters as f64], t.accuracy.unwrap_or(0.0));
        let beaten_by_none = front(&all.iter().map(|&i| costs(&self.trials[i])).collect::<Vec<_>>());
        let kept = all.into_iter().zip(beaten_by_none).filter(|(i, f)| *f || *i == teacher).map(|p| p.0);
        let mut bases: Vec<(String, usize)> = vec![];
        let (mut smaller, vocab) = (vec![], self.file.space.vocab.clone());
        for i in kept {
            let name = self.trials[i].shape.as_ref().map_or_else(|| "teacher".to_string(), |s| s.name());
            if vocab.contains(&Vocab::All) || i == teacher {
                bases.push((name.clone(), i));
            }
            for kept in &vocab {
                let Vocab::Train { first } = *kept else { continue };
                let path = |i: usize| Some(trial::place(&self.trials[i].dir));
                let mut stage = Prune { model: path(i), teacher: path(teacher), ..self.file.prune.clone() };
                (stage.vocab, stage.training.epochs) = (*kept, 0);
                let parent = (self.trials[i].key.clone(), self.trials[i].macs);
                let name = format!("{name}-v{}", if first > 0 { first.to_string() } else { String::new() });
                let trial = self.plan(name.clone(), "vocabulary", Kind::Prune(stage), &parent.0, 0, parent.1)?;
                smaller.push((name, trial));
            }
        }
        self.run_trials(&smaller.iter().map(|s| s.1).collect::<Vec<_>>())?;
        bases.extend(smaller);
        bases.retain(|b| self.trials[b.1].status == Status::Done);
        let mut candidates: Vec<Candidate> =
            bases.iter().map(|(name, i)| Candidate { name: name.clone(), trial: *i, storing: 0 }).collect();
        for (n, storing) in self.file.quantize.iter().enumerate() {
            for (name, i) in &bases {
                let model = Some(trial::place(&self.trials[*i].dir));
                let kind = Kind::Quantize(Quantize { model, ..storing.settings.clone() });
                let parent = (self.trials[*i].key.clone(), self.trials[*i].macs);
                let name = format!("{name}-{}", storing.id);
                let trial = self.plan(name.clone(), "storage", kind, &parent.0, 0, parent.1)?;
                candidates.push(Candidate { name, trial, storing: n + 1 });
            }
        }
        let new: Vec<usize> = candidates.iter().filter(|c| c.storing > 0).map(|c| c.trial).collect();
        self.run_trials(&new)?;
        candidates.retain(|c| self.trials[c.trial].status == Status::Done);
        Ok(candidates)
    }

    /// Times candidates, one process after the other with nothing beside it. Of two that are stored alike, one that
    /// computes more, is larger and no better needs no timing.
    fn measure(&mut self, candidates: Vec<Candidate>) -> Result<Vec<Point>> {
        let costs = |c: &Candidate| {
            let t = &self.trials[c.trial];
            ([t.macs, t.disk_bytes as f64], t.accuracy.unwrap_or(0.0))
        };
        let mut worth: Vec<Candidate> = vec![];
        let mut groups: BTreeMap<usize, Vec<Candidate>> = BTreeMap::new();
        candidates.into_iter().for_each(|c| groups.entry(c.storing).or_default().push(c));
        for group in groups.into_values() {
            let on_front = front(&group.iter().map(costs).collect::<Vec<_>>());
            let kept = group.into_iter().zip(on_front).filter(|(c, f)| *f || c.trial == 0);
            worth.extend(kept.map(|p| p.0));
        }
        let mut points = vec![];
        let n = worth.len();
        self.say(format!("timing {n} models, each in a process of its own"));
        for (i, c) in worth.into_iter().enumerate() {
            if crate::ui::is_interrupted() {
                return Err(crate::exit::interrupted("interrupted while timing"));
            }
            self.bar.at(self.trials.len() as u64, || format!("timing {} ({} of {n})", c.name, i + 1));
            let t = &self.trials[c.trial];
            let speed = match compare::measure(&t.dir, &self.data, self.options.threads) {
                Ok(speed) => speed,
                Err(e) => {
                    let why = format!("{}: could not be timed: {e:#}", c.name);
                    self.say(why);
                    continue;
                }
            };
            let accuracy = t.accuracy.unwrap_or(0.0);
            points.push(Point {
                name: c.name,
                dir: t.dir.clone(),
                validation_accuracy: accuracy,
                macs: t.macs,
                parameters: t.parameters,
                disk_bytes: t.disk_bytes,
                front: false,
                below_baseline: accuracy < self.baseline,
                speed,
            });
        }
        let costs: Vec<_> = points.iter().map(|p| (p.costs(), p.validation_accuracy)).collect();
        points.iter_mut().zip(front(&costs)).for_each(|(p, f)| p.front = f);
        Ok(points)
    }

    fn conclude(&mut self, teacher: usize, points: Vec<Point>) -> Result<Found> {
        let first = points.first().context("nothing could be timed, not even the teacher")?.clone();
        let recommended = recommended(&points, self.file.search.max_drop.0 / 100.0);
        let recommended = recommended.map(|p| p.name.clone());
        // Doublings and points, from the teacher's cost and the baseline's accuracy on.
        let at = |cost: fn(&Point) -> f64| -> Vec<(f64, f64)> {
            points.iter().map(|p| (cost(p).log2(), 100.0 * p.validation_accuracy)).collect()
        };
        let latency: fn(&Point) -> f64 = |p| p.speed.latency_ms.p50;
        let size: fn(&Point) -> f64 = |p| p.disk_bytes as f64;
        let reference = |cost: fn(&Point) -> f64| (cost(&first).log2(), 100.0 * self.baseline);
        let volume = |cost| round(hypervolume(&at(cost), reference(cost)), 4);
        let hypervolume = Hypervolume { latency: volume(latency), size: volume(size) };

        // The recommended point, then what says most about either cost, one after the other.
        let mut finals: Vec<usize> =
            points.iter().position(|p| Some(&p.name) == recommended.as_ref()).into_iter().collect();
        let orders = [latency, size].map(|cost| select(&at(cost), points.len(), reference(cost)));
        for i in (0..points.len()).flat_map(|n| orders.iter().map(move |o| o[n])) {
            if finals.len() < self.file.search.points && i > 0 && points[i].front && !finals.contains(&i) {
                finals.push(i);
            }
        }
        finals.sort_by(|&a, &b| latency(&points[b]).total_cmp(&latency(&points[a])));
        let shown: Vec<&Point> = std::iter::once(&first).chain(finals.iter().map(|&i| &points[i])).collect();
        let comparison = self.compare(&shown, recommended.clone())?;

        let out = &self.file.out;
        let title = "Quetsch: search";
        write_file(out.join("report.html"), comparison.html(title, Lang::En)?.as_bytes())?;
        write_file(out.join("report.zh.html"), comparison.html("Quetsch：搜索", Lang::Zh)?.as_bytes())?;
        write_file(out.join("report.md"), comparison.markdown(Lang::En).as_bytes())?;
        write_file(out.join("report.json"), &pretty(&comparison)?)?;
        let on_test: BTreeMap<&str, f64> = match self.file.data.test {
            Some(_) => comparison.variants.iter().map(|v| (v.name.as_str(), v.labels().accuracy)).collect(),
            None => BTreeMap::new(),
        };
        let first_accuracy = first.validation_accuracy;
        let outcome = Outcome {
            tool: comparison.tool,
            machine: machine::this(),
            threads: self.options.threads,
            jobs: self.options.jobs,
            search: self.file,
            teacher_validation_accuracy: self.trials[teacher].accuracy.unwrap_or(first_accuracy),
            baseline_validation_accuracy: self.baseline,
            max_drop: self.file.search.max_drop.0,
            recommended,
            hypervolume,
            points: &points,
            test_accuracy: on_test,
        };
        Ok(Found(self.save(Some(outcome))?))
    }

    /// The final points on the test data, which nothing before has looked at.
    fn compare(&mut self, shown: &[&Point], recommended: Option<String>) -> Result<Comparison> {
        let f = self.file;
        let test = f.data.test.clone();
        if test.is_none() {
            self.say("no test data: the final figures are of the validation part, on which the choice was made");
        }
        let held_out = test.is_none();
        let data = Data { test: test.or(self.data.test.clone()), ..self.data.clone() };
        let settings = Compare { no_speed: true, against_first: true, ..Compare::default() };
        let plan = Plan {
            models: shown.iter().map(|p| (p.name.clone(), p.dir.clone())).collect(),
            data: &data,
            calibration: None,
            settings: &settings,
            gates: &[],
            skip_gates: 1,
            threads: self.options.threads,
        };
        let mut comparison = compare::compare(&plan, self.ui)?;
        for (v, p) in comparison.variants.iter_mut().zip(shown) {
            v.speed = Some(p.speed.clone());
        }
        comparison.chosen = Some(Chosen { variant: recommended, max_drop: f.search.max_drop.0 / 100.0 });
        comparison.recipe = Some(toml::to_string(f)?);
        comparison.data.held_out = held_out;
        Ok(comparison)
    }
}

/// The fastest point, of equals the smallest, that loses at most `max_drop` against the first one, the teacher, and is
/// worth running: not below the baseline.
fn recommended(points: &[Point], max_drop: f64) -> Option<&Point> {
    let (first, others) = points.split_first()?;
    let wanted = first.validation_accuracy - max_drop - 1e-9;
    let good = others.iter().filter(|p| p.validation_accuracy >= wanted && !p.below_baseline);
    good.min_by(|a, b| {
        let fast = a.speed.latency_ms.p50.total_cmp(&b.speed.latency_ms.p50);
        fast.then(a.disk_bytes.cmp(&b.disk_bytes))
    })
}

impl Point {
    fn costs(&self) -> [f64; 3] {
        [self.speed.latency_ms.p50, mb(self.disk_bytes), self.speed.peak_rss_mb.unwrap_or(0.0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_the_baseline_is_never_recommended() {
        let point = |name: &str, accuracy: f64, ms: f64, disk_bytes: u64| Point {
            name: name.into(),
            dir: name.into(),
            validation_accuracy: accuracy,
            macs: 1.0,
            parameters: 1,
            disk_bytes,
            front: true,
            below_baseline: accuracy < 0.8,
            speed: serde_json::from_value(json!({
                "threads": 1,
                "isa": "scalar",
                "load_ms": 1.0,
                "first_answer_ms": 1.0,
                "latency_ms": { "p50": ms, "p99": ms },
                "by_length": [],
                "sentences_per_s": 1.0,
                "peak_rss_mb": null,
            }))
            .expect("a speed"),
        };
        let points = [
            point("teacher", 0.83, 9.0, 9),
            point("slow", 0.829, 2.0, 1),
            point("fast", 0.81, 1.0, 2),
            point("equal", 0.81, 1.0, 1),
            point("below", 0.79, 0.5, 1),
        ];
        for (max_drop, want) in [(0.0, None), (0.005, Some("slow")), (0.02, Some("equal")), (0.05, Some("equal"))] {
            assert_eq!(recommended(&points, max_drop).map(|p| p.name.as_str()), want, "{max_drop}");
        }
        assert!(
            recommended(&points[..1], 1.0).is_none()
                && recommended(&[points[0].clone(), points[4].clone()], 1.0).is_none()
        );
    }
}
