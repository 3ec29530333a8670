//! `[card]`: what a model card says that no program can know.

use super::{Check, Finding, Settings};
use clap::Args;
use serde::{Deserialize, Serialize};

/// What only people know about a model. It is printed in the card, README.md, and changes nothing else.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[command(next_help_heading = "Model card (README.md)")]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Card {
    /// Licence of the model, by its name on the hub (apache-2.0, mit, cc-by-4.0); what it was made from may restrict it
    #[arg(long, value_name = "LICENCE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    /// Pretrained model that all began with, by its name on the hub [default: known if it was fetched from there]
    #[arg(long, value_name = "ORG/NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// Data sets that it learned from, by their names on the hub [default: known if fetched from there]
    #[arg(long, value_delimiter = ',', value_name = "ORG/NAME")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub datasets: Vec<String>,
    /// Languages of the texts: en, de, zh
    #[arg(long, value_delimiter = ',', value_name = "CODE")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub languages: Vec<String>,
    /// Who is to be named for data or models, and their licences; may be given several times, a line each
    #[arg(long, value_name = "TEXT")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub credits: Vec<String>,
}

impl Settings for Card {
    fn check(&self) -> Vec<Finding> {
        let mut c = Check::default();
        let ids =
            self.base_model.iter().map(|m| ("base-model", m)).chain(self.datasets.iter().map(|d| ("datasets", d)));
        for (key, id) in ids {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
            c.error(!id.is_empty() && id.chars().all(plain), key, || {
                format!("is {id:?}, must be a name on the hub (ORG/NAME)")
            });
        }
        let code = |text: &str| {
            (2..=12).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        };
        c.error(self.languages.iter().all(|l| code(l)), "languages", || {
            format!("is {:?}, must be codes such as en or de", self.languages)
        });
        let name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-+".contains(c);
        c.error(self.license.as_ref().is_none_or(|l| !l.is_empty() && l.chars().all(name)), "license", || {
            format!("is {:?}, must be a name such as apache-2.0, or `other` with a line in `credits`", self.license)
        });
        c.error(self.credits.iter().all(|t| !t.trim().is_empty()), "credits", || "has an empty line".into());
        c.0
    }
}
