//! The models that are served, and how a new version of one takes the place of the old without a pause.
//!
//! A request holds the model that it began with, so a swap disturbs nobody: new requests see the new model, old ones
//! end with the old, and the last of them frees it. A directory that cannot be read changes nothing.

use crate::ModelSource;
use crate::refusal::Refusal;
use quetsch::batch::Batch;
use quetsch::checkpoint::{FloatType, Stored};
use quetsch::dir::Source;
use quetsch::quant::FourBitKind;
use quetsch::runtime::{Arithmetic, Classifier, Workspace};
use quetsch::spec::{Lin, Tensor};
use quetsch::task::Level;
use quetsch::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Instant, SystemTime};

/// A loaded model under its name.
pub struct Served {
    /// The name in requests.
    pub name: String,
    /// Where it came from.
    pub path: PathBuf,
    /// How its linears are stored.
    pub dtype: &'static str,
    /// The model.
    pub classifier: Classifier,
}

/// What tells versions of a directory apart: name, size and time of every file. Links are followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Stamp(Vec<(std::ffi::OsString, u64, Option<SystemTime>)>);

impl Stamp {
    fn of(path: &Path) -> Stamp {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let stamp = |entry: std::fs::DirEntry| {
            let metadata = std::fs::metadata(entry.path()).ok()?;
            Some((entry.file_name(), metadata.len(), metadata.modified().ok()))
        };
        let mut files: Vec<_> = entries.filter_map(stamp).collect();
        files.sort();
        Stamp(files)
    }
}

/// All models, by name.
pub struct Models {
    current: RwLock<Arc<[Arc<Served>]>>,
    max_length: Option<usize>,
    compute: Arithmetic,
    /// By model: the directory as it was last loaded or tried, and as it was last seen.
    stamps: Mutex<Vec<(Stamp, Stamp)>>,
}

impl Models {
    /// Loads all of them; each computes one sentence.
    ///
    /// # Errors
    /// A model that cannot be read, or a name that is there twice.
    pub fn load(sources: &[ModelSource], max_length: Option<usize>, compute: Arithmetic) -> Result<Models> {
        let mut models: Vec<Arc<Served>> = vec![];
        let mut stamps = vec![];
        for source in sources {
            if models.iter().any(|m| m.name == source.name) {
                return Err(Error::invalid(format!(
                    "two models are called `{}`; give them names: --model NAME=DIR",
                    source.name
                )));
            }
            let stamp = Stamp::of(&source.path);
            models.push(Arc::new(load(&source.name, &source.path, max_length, compute)?));
            stamps.push((stamp.clone(), stamp));
        }
        if models.is_empty() {
            return Err(Error::invalid("no model to serve; give one with --model DIR"));
        }
        Ok(Models { current: RwLock::new(models.into()), max_length, compute, stamps: Mutex::new(stamps) })
    }

    /// All models as they are now; the first is the one for protocols that name none.
    pub fn all(&self) -> Arc<[Arc<Served>]> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The model for requests that name none.
    pub fn first(&self) -> Arc<Served> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)[0].clone() // there is one: `load` saw to it
    }

    /// A model by its name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, name: &str) -> std::result::Result<Arc<Served>, Refusal> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let found = current.iter().find(|m| m.name == name).cloned();
        found.ok_or_else(|| Refusal::UnknownModel(name.into()))
    }

    /// Loads the models `which` again; the old ones serve until then, and on if a new one cannot be loaded.
    pub fn reload(&self, which: Which) {
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner); // one reload at a time
        for (i, old) in self.all().iter().enumerate() {
            let now = Stamp::of(&old.path);
            let (tried, seen) = &mut stamps[i];
            let settled = now == *seen;
            *seen = now.clone();
            match which {
                Which::Changed if now == *tried || !settled => continue,
                Which::Changed | Which::All => *tried = now,
            }
            let begin = Instant::now();
            match load(&old.name, &old.path, self.max_length, self.compute) {
                Ok(new) => {
                    let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
                    let mut models = current.to_vec();
                    models[i] = Arc::new(new);
                    *current = models.into();
                    drop(current);
                    let ms = begin.elapsed().as_millis() as u64;
                    tracing::info!(model = old.name, ms, "reloaded");
                }
                Err(e) => tracing::error!(model = old.name, "not reloaded, the old model serves on: {e}"),
            }
        }
    }
}

/// Which models to load again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// All.
    All,
    /// Those whose directory is another than the one last loaded and the same as at the last look: one that is still
    /// being written is left alone.
    Changed,
}

fn load(name: &str, path: &Path, max_length: Option<usize>, compute: Arithmetic) -> Result<Served> {
    let classifier = Classifier::load_for(path, max_length, compute)?;
    if classifier.task().level == Level::Token {
        return Err(Error::file(path, "the model answers for each word of a text, which no protocol here can say"));
    }
    let dtype = dtype(path)?;
    let sentence = classifier.tokenizer().encode("warm up", classifier.max_length())?;
    let batch = Batch::new(classifier.model().spec(), [&sentence])?;
    let logits = classifier.model().forward(&mut Workspace::default(), &batch)?;
    if !logits.iter().all(|x| x.is_finite()) {
        return Err(Error::file(path, "the model computes NaN: its weights are broken"));
    }
    Ok(Served { name: name.into(), path: path.into(), dtype, classifier })
}

/// How the linears are stored: the first quantised one among those of query and feed-forward says it, else the first.
fn dtype(path: &Path) -> Result<&'static str> {
    let name = |stored: &Stored| match stored {
        Stored::Float { dtype: FloatType::F32, .. } => "float32",
        Stored::Float { dtype: FloatType::F16, .. } => "float16",
        Stored::Float { dtype: FloatType::Bf16, .. } => "bfloat16",
        Stored::Int8(_) => "int8",
        Stored::FourBit(q) if q.kind == FourBitKind::Nf4 => "nf4",
        Stored::FourBit(_) => "fp4",
    };
    let mut source = Source::open(path)?;
    let mut first = None;
    let linears = source.spec().linears().into_iter().map(|(site, ..)| site);
    for site in linears.filter(|site| matches!(site, Lin::Query(_) | Lin::Up(_))).collect::<Vec<_>>() {
        let weight = Tensor::W(site);
        let part = source.part(&[weight])?;
        let stored = part.get(weight);
        if !matches!(stored, Stored::Float { .. }) {
            return Ok(name(stored));
        }
        first.get_or_insert(name(stored));
    }
    Ok(first.unwrap_or("float32"))
}
