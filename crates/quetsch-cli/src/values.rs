//! Values with their own small grammar, the same on the command line and in recipes.

use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// How much to prune: a share, a number, or exactly these.
#[derive(Clone, Debug, PartialEq)]
pub enum Amount {
    /// A share of all, 0 to 1.
    Share(f64),
    /// So many.
    Count(usize),
    /// These: `layer` or `layer:head`.
    List(Vec<Place>),
}

/// A layer, or a head of a layer by its original index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Layer, from 0.
    pub layer: usize,
    /// Head, from 0.
    pub head: Option<u16>,
}

impl Default for Amount {
    fn default() -> Self {
        Amount::Count(0)
    }
}

impl Amount {
    /// Whether nothing is asked for.
    pub fn is_none(&self) -> bool {
        match self {
            Amount::Share(s) => *s == 0.0,
            Amount::Count(n) => *n == 0,
            Amount::List(l) => l.is_empty(),
        }
    }

    /// How many of `total`, a share rounded to the nearest; a list by its length.
    pub fn of(&self, total: usize) -> usize {
        match self {
            Amount::Share(s) => (s * total as f64).round() as usize,
            Amount::Count(n) => *n,
            Amount::List(l) => l.len(),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        let bad = |_| format!("`{text}` is neither a layer (3) nor layer:head (3:11)");
        match text.split_once(':') {
            None => Ok(Place { layer: text.trim().parse().map_err(bad)?, head: None }),
            Some((layer, head)) => Ok(Place {
                layer: layer.trim().parse().map_err(bad)?,
                head: Some(head.trim().parse().map_err(bad)?),
            }),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.head {
            None => write!(f, "{}", self.layer),
            Some(head) => write!(f, "{}:{head}", self.layer),
        }
    }
}

impl FromStr for Amount {
    type Err = String;

    /// `0.3` and `30%` are shares, `12` is a number, `0:1,2:3` and `3,5` are lists; a list of one ends in a comma.
    fn from_str(text: &str) -> Result<Amount, String> {
        let bad = || format!("`{text}` is no share (0.3), number (12) or list (0:1,2:3)");
        if text.contains([',', ':']) {
            let items = text.split(',').filter(|s| !s.trim().is_empty());
            return items.map(str::parse).collect::<Result<_, _>>().map(Amount::List);
        }
        if let Some(percent) = text.strip_suffix('%') {
            return percent.trim().parse::<f64>().map(|p| Amount::Share(p / 100.0)).map_err(|_| bad());
        }
        if let Ok(count) = text.parse() {
            return Ok(Amount::Count(count));
        }
        text.parse().map(Amount::Share).map_err(|_| bad())
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Amount::Share(s) => write!(f, "{s:?}"),
            Amount::Count(n) => write!(f, "{n}"),
            Amount::List(l) => {
                let items: Vec<_> = l.iter().map(Place::to_string).collect();
                write!(f, "{}{}", items.join(","), if l.len() == 1 { "," } else { "" })
            }
        }
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Amount::Share(x) => s.serialize_f64(*x),
            Amount::Count(n) => s.serialize_u64(*n as u64),
            Amount::List(l) => s.collect_seq(l.iter().map(Place::to_string)),
        }
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Amount, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Amount;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a share (0.3), a number (12) or a list ([\"0:1\", \"2:3\"])")
            }
            fn visit_f64<E>(self, x: f64) -> Result<Amount, E> {
                Ok(Amount::Share(x))
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Amount, E> {
                usize::try_from(n).map(Amount::Count).map_err(|_| E::custom(format!("{n} is below 0")))
            }
            fn visit_u64<E>(self, n: u64) -> Result<Amount, E> {
                Ok(Amount::Count(n as usize))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Amount, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Amount, A::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Item {
                    Layer(usize),
                    Text(String),
                }
                let mut list = vec![];
                while let Some(item) = seq.next_element::<Item>()? {
                    list.push(match item {
                        Item::Layer(layer) => Place { layer, head: None },
                        Item::Text(text) => text.parse().map_err(de::Error::custom)?,
                    });
                }
                Ok(Amount::List(list))
            }
        }
        d.deserialize_any(V)
    }
}

/// A difference of accuracies in points: `0.5` or `0.5pt`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Points(pub f64);

impl FromStr for Points {
    type Err = String;

    fn from_str(text: &str) -> Result<Points, String> {
        let number = text.trim().strip_suffix("pt").unwrap_or(text).trim();
        number.parse().map(Points).map_err(|_| format!("`{text}` is no number of points, such as 0.5 or 0.5pt"))
    }
}

impl fmt::Display for Points {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl<'de> Deserialize<'de> for Points {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Points, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(f64),
            Text(String),
        }
        match Form::deserialize(d)? {
            Form::Number(x) => Ok(Points(x)),
            Form::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

/// A scheme for the sites that match a pattern; recipes may write `{ site = "..", scheme = ".." }` or `"..=.."`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "SiteRuleForm")]
pub struct SiteRule {
    /// Site pattern.
    pub site: String,
    /// Scheme name.
    pub scheme: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SiteRuleForm {
    Text(String),
    Table { site: String, scheme: String },
}

impl TryFrom<SiteRuleForm> for SiteRule {
    type Error = String;

    fn try_from(form: SiteRuleForm) -> Result<SiteRule, String> {
        match form {
            SiteRuleForm::Text(text) => text.parse(),
            SiteRuleForm::Table { site, scheme } => Ok(SiteRule { site, scheme }),
        }
    }
}

impl FromStr for SiteRule {
    type Err = String;

    fn from_str(text: &str) -> Result<SiteRule, String> {
        match text.split_once('=') {
            Some((site, scheme)) => Ok(SiteRule { site: site.trim().into(), scheme: scheme.trim().into() }),
            None => Err(format!("`{text}` is not SITE=SCHEME, such as layer.0.ffn_down=bf16")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points() {
        for (text, want) in
            [("0.5", Some(0.5)), ("0.5pt", Some(0.5)), (" 1 pt", Some(1.0)), ("half", None), ("", None)]
        {
            assert_eq!(text.parse().ok(), want.map(Points), "{text}");
        }
    }

    #[test]
    fn amounts() {
        let place = |layer, head| Place { layer, head };
        let rows = [
            ("0.3", Ok(Amount::Share(0.3))),
            ("30%", Ok(Amount::Share(0.3))),
            ("1", Ok(Amount::Count(1))),
            ("1.0", Ok(Amount::Share(1.0))),
            ("0:1,2:3", Ok(Amount::List(vec![place(0, Some(1)), place(2, Some(3))]))),
            ("3,5", Ok(Amount::List(vec![place(3, None), place(5, None)]))),
            ("3,", Ok(Amount::List(vec![place(3, None)]))),
            ("many", Err(())),
            ("0:x", Err(())),
        ];
        for (text, want) in rows {
            assert_eq!(text.parse::<Amount>().map_err(|_| ()), want, "{text}");
            if let Ok(want) = want {
                assert_eq!(want.to_string().parse(), Ok(want), "{text} survives being printed");
            }
        }
        assert_eq!(Amount::Share(0.3).of(36), 11);
    }
}
