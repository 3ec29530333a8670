//! Which layer of a student learns from which layers of its teacher.

use quetsch::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A layer of the student, and the layers of the teacher whose mean (or learned mixture) it learns from.
pub type Pair = (usize, Vec<usize>);

/// A rule or a list. As text: `uniform`, `mean`, `weighted`, `last`, or student:teacher pairs such as `0:1,1:2+3`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum LayerMap {
    /// Layer i of S from layer floor((i + 1) T / S) - 1 of T.
    #[default]
    Uniform,
    /// Layer i of S from the mean of the layers floor(i T / S) to floor((i + 1) T / S) - 1 of T.
    Mean,
    /// Every layer from all layers of the teacher, each with a learned weight.
    Weighted,
    /// The last from the last.
    Last,
    /// These.
    Pairs(Vec<Pair>),
}

impl LayerMap {
    /// The pairs for a student and a teacher of so many layers.
    ///
    /// # Errors
    /// Layers that are not there, or a student deeper than its teacher.
    pub fn pairs(&self, student: usize, teacher: usize) -> Result<Vec<Pair>> {
        let bad = |m: String| Err(Error::invalid(m));
        if student == 0 || teacher == 0 {
            return bad(format!("{student} student and {teacher} teacher layers cannot be paired"));
        }
        let end = |i: usize| i * teacher / student;
        match self {
            LayerMap::Last => Ok(vec![(student - 1, vec![teacher - 1])]),
            LayerMap::Weighted => Ok((0..student).map(|i| (i, (0..teacher).collect())).collect()),
            LayerMap::Uniform | LayerMap::Mean if student > teacher => bad(format!(
                "the student has {student} layers, the teacher {teacher}: a {self} map needs a teacher at least as \
                 deep; list pairs (0:0,1:1) or use last"
            )),
            LayerMap::Uniform => Ok((0..student).map(|i| (i, vec![end(i + 1) - 1])).collect()),
            LayerMap::Mean => Ok((0..student).map(|i| (i, (end(i)..end(i + 1)).collect())).collect()),
            LayerMap::Pairs(pairs) => {
                if let Some((s, _)) = pairs.iter().find(|(_, t)| t.is_empty()) {
                    return bad(format!("the layer map names no teacher layer for student layer {s}"));
                }
                let is_wrong = |(s, t): &&Pair| *s >= student || t.iter().any(|t| *t >= teacher);
                match pairs.iter().find(is_wrong) {
                    Some(pair) => bad(format!(
                        "the layer map has {}, the student has {student} layers and the teacher {teacher}, counted \
                         from 0",
                        LayerMap::Pairs(vec![pair.clone()])
                    )),
                    None => Ok(pairs.clone()),
                }
            }
        }
    }
}

impl FromStr for LayerMap {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<LayerMap, String> {
        let pair = |p: &str| {
            let (s, t) = p.split_once(':')?;
            let teachers = t.split('+').map(|t| t.trim().parse().ok()).collect::<Option<_>>()?;
            Some((s.trim().parse().ok()?, teachers))
        };
        match text {
            "uniform" => Ok(LayerMap::Uniform),
            "mean" => Ok(LayerMap::Mean),
            "weighted" => Ok(LayerMap::Weighted),
            "last" => Ok(LayerMap::Last),
            list => list.split(',').map(pair).collect::<Option<_>>().map(LayerMap::Pairs).ok_or_else(|| {
                format!(
                    "`{text}` is none of uniform, mean, weighted, last, and no student:teacher pairs (0:1,1:2+3)"
                )
            }),
        }
    }
}

impl fmt::Display for LayerMap {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let joined = |t: &[usize]| t.iter().map(usize::to_string).collect::<Vec<_>>().join("+");
        match self {
            LayerMap::Uniform => f.write_str("uniform"),
            LayerMap::Mean => f.write_str("mean"),
            LayerMap::Weighted => f.write_str("weighted"),
            LayerMap::Last => f.write_str("last"),
            LayerMap::Pairs(p) => {
                let pairs: Vec<String> = p.iter().map(|(s, t)| format!("{s}:{}", joined(t))).collect();
                f.write_str(&pairs.join(","))
            }
        }
    }
}

impl TryFrom<String> for LayerMap {
    type Error = String;
    fn try_from(text: String) -> std::result::Result<LayerMap, String> {
        text.parse()
    }
}

impl From<LayerMap> for String {
    fn from(map: LayerMap) -> String {
        map.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps() {
        let one = |pairs: &[(usize, usize)]| Some(pairs.iter().map(|(s, t)| (*s, vec![*t])).collect());
        let rows = [
            ("uniform", 3, 6, one(&[(0, 1), (1, 3), (2, 5)])),
            ("uniform", 4, 6, one(&[(0, 0), (1, 2), (2, 3), (3, 5)])),
            ("uniform", 2, 2, one(&[(0, 0), (1, 1)])),
            ("uniform", 3, 2, None),
            ("mean", 2, 6, Some(vec![(0, vec![0, 1, 2]), (1, vec![3, 4, 5])])),
            ("mean", 4, 6, Some(vec![(0, vec![0]), (1, vec![1, 2]), (2, vec![3]), (3, vec![4, 5])])),
            ("mean", 3, 2, None),
            ("weighted", 2, 3, Some(vec![(0, vec![0, 1, 2]), (1, vec![0, 1, 2])])),
            ("weighted", 3, 1, one(&[(0, 0), (1, 0), (2, 0)])),
            ("last", 3, 6, one(&[(2, 5)])),
            ("last", 6, 2, one(&[(5, 1)])),
            ("last", 0, 2, None),
            ("0:1,2:5", 3, 6, one(&[(0, 1), (2, 5)])),
            ("0:1+2,2:5", 3, 6, Some(vec![(0, vec![1, 2]), (2, vec![5])])),
            ("0:6", 3, 6, None),
            ("0:1+6", 3, 6, None),
            ("3:0", 3, 6, None),
        ];
        for (text, s, t, want) in rows {
            let map: LayerMap = text.parse().unwrap();
            assert_eq!(map.pairs(s, t).ok(), want, "{text} {s} {t}");
            assert_eq!(map.to_string(), text);
        }
        for bad in ["", "first", "0", "0:1,", "a:1", "0:", "0:1+"] {
            assert!(bad.parse::<LayerMap>().is_err(), "{bad}");
        }
    }
}
