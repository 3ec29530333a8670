//! What a stage learns of its teacher: settings become an objective.

use crate::settings::{self, Kd};
use anyhow::Result;
use quetsch::batch::Encoding;
use quetsch::checkpoint::Checkpoint;
use quetsch::runtime::Model;
use quetsch::spec::ModelSpec;
use quetsch_train::features::{Compare, Features, LayerMap, Link, Qkv};
use quetsch_train::{Measure, Soft};

/// A teacher, and what of it is learned besides its logits.
pub struct Inside {
    teacher: Model,
    links: Vec<Link>,
}

impl Inside {
    /// None if the loss has no such part: the teacher need not run again.
    pub fn new(s: &Kd, teacher: &Checkpoint, student: &ModelSpec) -> Result<Option<Inside>> {
        let (from, to) = (student.layers.len(), teacher.spec.layers.len());
        let mut links = vec![];
        let mut add = |compare: Compare, map: &LayerMap, weight: f64| -> Result<()> {
            if weight > 0.0 {
                links.extend(Link::of(compare, &map.pairs(from, to)?, weight as f32));
            }
            Ok(())
        };
        let distance = measure(s.hidden_loss);
        add(Compare::Hidden(distance), &s.hidden_map, s.hidden)?;
        add(Compare::Embeddings(distance), &LayerMap::Pairs(vec![(0, vec![0])]), s.embeddings)?;
        add(Compare::Attention, &s.attention_map, s.attention)?;
        if s.hidden_map == LayerMap::Weighted {
            let hidden = links.iter_mut().filter(|l| matches!(l.compare, Compare::Hidden(_)));
            hidden.for_each(|l| l.weighted = true);
        }
        let heads = s.relation_heads.unwrap_or(teacher.spec.original_heads.into());
        let mut relations = vec![];
        for of in &s.relations_of {
            let of = match of {
                settings::Qkv::Query => Qkv::Query,
                settings::Qkv::Key => Qkv::Key,
                settings::Qkv::Value => Qkv::Value,
            };
            if s.relations > 0.0 {
                relations.extend(Link::of(
                    Compare::Relation(of, heads),
                    &s.relations_map.pairs(from, to)?,
                    s.relations as f32,
                ));
            }
        }
        let kinds = s.relations_of.len() as f32;
        relations.iter_mut().for_each(|l| l.share /= kinds);
        links.extend(relations);
        Ok((!links.is_empty()).then(|| Inside { teacher: Model::pack(teacher), links }))
    }

    /// For these training sentences, as the teacher reads them.
    pub fn features<'a>(&'a self, encodings: &'a [Encoding]) -> Features<'a> {
        Features { teacher: &self.teacher, encodings, links: &self.links }
    }
}

/// The part of the logits, and what happens inside.
pub fn soft<'a>(s: &Kd, logits: &'a [f32], features: Option<Features<'a>>) -> Soft<'a> {
    Soft {
        alpha: s.alpha as f32,
        temperature: s.temperature as f32,
        alpha_end: s.alpha_end.map(|x| x as f32),
        temperature_end: s.temperature_end.map(|x| x as f32),
        logits,
        logits_weight: s.logits as f32,
        logits_loss: measure(s.logits_loss),
        differences: s.differences as f32,
        features,
    }
}

pub fn measure(m: settings::Measure) -> Measure {
    match m {
        settings::Measure::Mse => Measure::Mse,
        settings::Measure::L1 => Measure::L1,
        settings::Measure::Cosine => Measure::Cosine,
    }
}
