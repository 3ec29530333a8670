//! The queue, the workers behind it, and the way of a request through both.

pub use crate::models::Served;
use crate::models::{Models, Which};
use crate::queue::{Queue, Refused};
use crate::refusal::Refusal;
use crate::{Config, Limits, telemetry};
use metrics::{counter, gauge, histogram};
use quetsch::Error;
use quetsch::batch::{Batch, Encoding};
use quetsch::runtime::{Session, Workspace};
use quetsch::tokenizer::Cut;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// One text or a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// The text.
    pub text: String,
    /// The second one of a pair.
    pub pair: Option<String>,
}

impl Sequence {
    fn bytes(&self) -> usize {
        self.text.len() + self.pair.as_ref().map_or(0, String::len)
    }
    /// Number of characters.
    pub fn chars(&self) -> usize {
        self.text.chars().count() + self.pair.as_ref().map_or(0, |p| p.chars().count())
    }
}

/// What to do with a text of too many tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlong {
    /// Refuse the request.
    Refuse,
    /// Cut it at this end.
    Cut(Cut),
}

/// Where the time of a request went; means over its texts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// All of it.
    pub total: Duration,
    /// Texts to ids.
    pub tokenization: Duration,
    /// Waiting for a worker.
    pub queue: Duration,
    /// The forward of the batch.
    pub inference: Duration,
}

/// The answer to one request.
pub struct Answers {
    /// Logits by text, in the order of the request.
    pub logits: Vec<Vec<f32>>,
    /// Tokens read.
    pub tokens: usize,
    /// Where the time went.
    pub timing: Timing,
}

struct Answer {
    logits: Vec<f32>,
    queue: Duration,
    inference: Duration,
}

struct Job {
    model: Arc<Served>,
    encoding: Encoding,
    queued: Instant,
    reply: oneshot::Sender<Result<Answer, Refusal>>,
}

/// Longer requests than this many bytes are tokenised away from the threads that talk to clients.
const TOKENISE_INLINE: usize = 4096;

/// Everything behind the protocols.
pub struct Engine {
    models: Models,
    queue: Arc<Queue<Job>>,
    workers: Vec<JoinHandle<()>>,
    limits: Limits,
}

impl Engine {
    /// Loads all models and starts the workers.
    ///
    /// # Errors
    /// A model that cannot be read, or a name that is there twice.
    pub fn start(config: &Config) -> quetsch::Result<Engine> {
        let models = Models::load(&config.models, config.max_length, config.compute)?;
        let limits = config.limits;
        let queue = Arc::new(Queue::new(limits.max_concurrent_requests));
        let idle = Arc::new(Idle { session: Session::new(config.threads), busy: AtomicUsize::new(0) });
        let workers = (0..config.threads.max(1))
            .map(|i| {
                let (queue, idle) = (queue.clone(), idle.clone());
                let name = format!("worker-{i}");
                std::thread::Builder::new().name(name).spawn(move || work(&queue, &idle, &limits))
            })
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|e| Error::invalid(format!("cannot start a worker thread: {e}")))?;
        Ok(Engine { models, queue, workers, limits })
    }

    /// All models; the first is the one for protocols that name none.
    pub fn models(&self) -> Arc<[Arc<Served>]> {
        self.models.all()
    }

    /// The model for requests that name none.
    pub fn first(&self) -> Arc<Served> {
        self.models.first()
    }

    /// A model by its name.
    ///
    /// # Errors
    /// There is none.
    pub fn model(&self, name: &str) -> Result<Arc<Served>, Refusal> {
        self.models.find(name)
    }

    /// Loads models again; takes as long as loading takes.
    pub fn reload(&self, which: Which) {
        self.models.reload(which);
    }

    /// Tokenises and classifies the texts of one request.
    ///
    /// # Errors
    /// A limit, a full queue, or a failure of the tokeniser or the model.
    pub async fn classify(
        &self,
        model: &Arc<Served>,
        texts: Vec<Sequence>,
        overlong: Overlong,
    ) -> Result<Answers, Refusal> {
        let start = Instant::now();
        self.check_batch(texts.len())?;
        let limit = self.limits.max_text_bytes;
        if let Some(text) = texts.iter().find(|t| t.bytes() > limit) {
            return Err(Refusal::Limit(format!("a text has {} bytes, this server takes {limit}", text.bytes())));
        }
        let encodings = match texts.iter().map(Sequence::bytes).sum::<usize>() > TOKENISE_INLINE {
            false => encode(model, &texts, overlong),
            true => {
                let model = model.clone();
                let task = tokio::task::spawn_blocking(move || encode(&model, &texts, overlong));
                task.await.unwrap_or_else(|_| Err(Refusal::Tokenizer("the tokeniser failed".into())))
            }
        }?;
        self.answer(model, encodings, start).await
    }

    /// Classifies sentences that are token ids already.
    ///
    /// # Errors
    /// Ids that the model does not have, a limit, a full queue, or a failure of the model.
    pub async fn classify_ids(&self, model: &Arc<Served>, encodings: Vec<Encoding>) -> Result<Answers, Refusal> {
        self.check_batch(encodings.len())?;
        let limit = model.classifier.max_length();
        if let Some(e) = encodings.iter().find(|e| e.ids.len() > limit) {
            return Err(Refusal::Limit(format!("a row has {} tokens, this model takes {limit}", e.ids.len())));
        }
        Batch::new(model.classifier.model().spec(), &encodings).map_err(|e| Refusal::Shape(e.to_string()))?;
        self.answer(model, encodings, Instant::now()).await
    }

    fn check_batch(&self, n: usize) -> Result<(), Refusal> {
        let limit = self.limits.max_client_batch_size;
        match n {
            0 => Err(Refusal::Empty),
            n if n > limit => Err(Refusal::Limit(format!("batch size {n} > maximum allowed batch size {limit}"))),
            _ => Ok(()),
        }
    }

    async fn answer(
        &self,
        model: &Arc<Served>,
        encodings: Vec<Encoding>,
        start: Instant,
    ) -> Result<Answers, Refusal> {
        let method = if encodings.len() == 1 { "single" } else { "batch" };
        telemetry::arrived(method);
        let tokenization = start.elapsed();
        let tokens = encodings.iter().map(|e| e.ids.len()).sum();
        let replies = self.submit(model, encodings)?;
        let n = replies.len() as u32;
        let mut timing = Timing { tokenization: tokenization / n, ..Timing::default() };
        let mut logits = Vec::with_capacity(replies.len());
        for reply in replies {
            let answer = reply.await.unwrap_or_else(|_| Err(gone()))?;
            timing.queue += answer.queue / n;
            timing.inference += answer.inference / n;
            logits.push(answer.logits);
        }
        timing.total = start.elapsed();
        telemetry::answered(method, &timing);
        Ok(Answers { logits, tokens, timing })
    }

    fn submit(
        &self,
        model: &Arc<Served>,
        encodings: Vec<Encoding>,
    ) -> Result<Vec<oneshot::Receiver<Result<Answer, Refusal>>>, Refusal> {
        let queued = Instant::now();
        let (mut jobs, mut replies) = (Vec::with_capacity(encodings.len()), Vec::with_capacity(encodings.len()));
        for encoding in encodings {
            let (reply, receiver) = oneshot::channel();
            let tokens = encoding.ids.len();
            histogram!("te_request_input_length").record(tokens as f64);
            jobs.push((tokens, Job { model: model.clone(), encoding, queued, reply }));
            replies.push(receiver);
        }
        self.queue.push(jobs).map_err(|e| match e {
            Refused::Full => Refusal::Overloaded,
            Refused::Closed => Refusal::NotReady,
        })?;
        gauge!("te_queue_size").set(self.queue.len() as f64);
        Ok(replies)
    }
}

impl Drop for Engine {
    /// Answers what is in the queue and ends the workers.
    fn drop(&mut self) {
        self.queue.close();
        for worker in self.workers.drain(..) {
            let _ = worker.join(); // it catches its panics, and there is nobody to tell
        }
    }
}

fn gone() -> Refusal {
    Refusal::Inference("the worker ended".into())
}

fn encode(model: &Served, texts: &[Sequence], overlong: Overlong) -> Result<Vec<Encoding>, Refusal> {
    let (tokenizer, limit) = (model.classifier.tokenizer(), model.classifier.max_length());
    let one = |s: &Sequence| {
        let (length, cut) = match overlong {
            Overlong::Refuse => (usize::MAX, Cut::Right),
            Overlong::Cut(cut) => (limit, cut),
        };
        let e = tokenizer.encode_cut(&s.text, s.pair.as_deref(), length, cut);
        let e = e.map_err(|e| Refusal::Tokenizer(e.to_string()))?;
        match e.ids.len() {
            n if n > limit => Err(Refusal::Limit(format!(
                "Input validation error: `inputs` must have less than {limit} tokens. Given: {n}"
            ))),
            _ => Ok(e),
        }
    };
    texts.iter().map(one).collect()
}

/// Threads that sleep unless a batch is alone in the server: then they help its worker.
struct Idle {
    session: Session,
    /// Workers that compute.
    busy: AtomicUsize,
}

/// A worker: takes batches until the queue is closed and empty.
fn work(queue: &Queue<Job>, idle: &Idle, limits: &Limits) {
    let mut workspace = Workspace::default();
    while let Some(mut jobs) = queue.take(limits.max_batch_tokens, |a, b| Arc::ptr_eq(&a.model, &b.model)) {
        gauge!("te_queue_size").set(queue.len() as f64);
        jobs = jobs.into_iter().filter_map(|job| still_wanted(job, limits)).collect();
        let Some(model) = jobs.first().map(|j| j.model.clone()) else { continue };
        let started = Instant::now();
        // A panic here is a bug; it must cost one batch, not a worker.
        let lone = idle.busy.fetch_add(1, Ordering::Relaxed) == 0 && queue.len() == 0;
        let help = lone.then_some(&idle.session);
        let forward = catch_unwind(AssertUnwindSafe(|| forward(&model, &jobs, help, &mut workspace)));
        idle.busy.fetch_sub(1, Ordering::Relaxed);
        let logits = forward.unwrap_or_else(|_| {
            workspace = Workspace::default();
            Err(Refusal::Inference("the forward failed".into()))
        });
        let inference = started.elapsed();
        let labels = model.classifier.labels().len();
        for (i, job) in jobs.into_iter().enumerate() {
            let row = logits.as_ref().map(|l| l[i * labels..(i + 1) * labels].to_vec()).map_err(Refusal::clone);
            let answer = row.and_then(finite).map(|logits| {
                let queue = started.saturating_duration_since(job.queued);
                Answer { logits, queue, inference }
            });
            let _ = job.reply.send(answer); // the client may have gone
        }
    }
}

/// A job whose client is still there and that has not waited too long.
fn still_wanted(job: Job, limits: &Limits) -> Option<Job> {
    if job.reply.is_closed() {
        counter!("te_request_failure", "err" => "dropped").increment(1);
        return None;
    }
    if job.queued.elapsed() > limits.queue_timeout {
        let _ = job.reply.send(Err(Refusal::Overloaded));
        return None;
    }
    Some(job)
}

fn forward(
    model: &Served,
    jobs: &[Job],
    help: Option<&Session>,
    workspace: &mut Workspace,
) -> Result<Vec<f32>, Refusal> {
    let model = model.classifier.model();
    let batch =
        Batch::new(model.spec(), jobs.iter().map(|j| &j.encoding)).map_err(|e| Refusal::Shape(e.to_string()))?;
    histogram!("te_batch_next_size").record(jobs.len() as f64);
    histogram!("te_batch_next_tokens").record(batch.tokens() as f64);
    let logits = match help {
        Some(session) => session.forward(model, workspace, &batch),
        None => model.forward(workspace, &batch),
    };
    logits.map_err(|e| Refusal::Inference(e.to_string()))
}

/// JSON has no NaN, and a model that gives one is broken.
fn finite(logits: Vec<f32>) -> Result<Vec<f32>, Refusal> {
    match logits.iter().all(|x| x.is_finite()) {
        true => Ok(logits),
        false => Err(Refusal::Inference("score is NaN".into())),
    }
}
