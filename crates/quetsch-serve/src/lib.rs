//! A classifier server on one small runtime: Hugging Face text-embeddings-inference `/predict`, Open Inference Protocol
//! v2 over REST and gRPC, and vLLM `/classify`, with the same answers as `quetsch predict`.
//!
//! A request comes in through a `door` (connections, TLS), then `http` (limits, key, request id), one protocol module
//! (`tei`, `oip`, `vllm`), `engine` (tokens, queue, workers; `models` swaps them), and back. [`run`] is all that a
//! program needs.

mod door;
mod engine;
mod http;
mod models;
mod oip;
mod page;
mod queue;
#[cfg(test)]
mod queue_tests;
mod refusal;
mod sync;
mod tei;
mod telemetry;
mod tls;
mod vllm;

pub use axum::http::HeaderValue;
pub use http::{Listening, serve};
pub use tls::TlsFiles;

use quetsch::runtime::Arithmetic;
use quetsch::{Error, Result};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// A model directory and its name in requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSource {
    /// The name in requests.
    pub name: String,
    /// The model directory.
    pub path: PathBuf,
}

impl ModelSource {
    /// `NAME=DIR`, or `DIR` alone, which is called as its last part.
    pub fn parse(text: &str) -> ModelSource {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !name.contains('/') => {
                ModelSource { name: name.into(), path: path.into() }
            }
            _ => {
                let path = Path::new(text);
                let last = path.file_name().map(|n| n.to_string_lossy().into_owned());
                ModelSource { name: last.unwrap_or_else(|| "model".into()), path: path.into() }
            }
        }
    }
}

/// What a client may ask for, and how long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Texts that may wait for a worker; beyond them requests get 429.
    pub max_concurrent_requests: usize,
    /// Tokens of one forward; a longer text goes alone. More do not make a CPU faster, only the others wait.
    pub max_batch_tokens: usize,
    /// Texts in one request.
    pub max_client_batch_size: usize,
    /// Bytes of a body.
    pub payload_limit: usize,
    /// Bytes of one text (both of a pair).
    pub max_text_bytes: usize,
    /// Connections at one time; further ones wait in the operating system.
    pub max_connections: usize,
    /// From the opening of a connection, or the end of an answer, to the end of the next request's headers.
    pub header_timeout: Duration,
    /// From the end of the headers to the end of the body.
    pub body_timeout: Duration,
    /// How long a text may wait for a worker; then its request gets 429.
    pub queue_timeout: Duration,
    /// From the signal to stop to the end, whatever is unanswered then.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_concurrent_requests: 512,
            max_batch_tokens: 128, // the chunk of `Model::logits`
            max_client_batch_size: 32,
            payload_limit: 2_000_000,
            max_text_bytes: 128 * 1024,
            max_connections: 1024,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(10),
            queue_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// The hash of an API key: the key itself is not kept, and hashes are compared in constant time.
#[derive(Clone, Copy, Debug)]
pub struct ApiKey(blake3::Hash);

impl ApiKey {
    /// Of the key as clients send it.
    pub fn new(key: &str) -> ApiKey {
        ApiKey(blake3::hash(key.as_bytes()))
    }

    fn is(&self, key: &[u8]) -> bool {
        self.0 == blake3::hash(key) // blake3's equality takes constant time
    }
}

/// A server.
#[derive(Clone, Debug)]
pub struct Config {
    /// The models; the first is the one for protocols that name none.
    pub models: Vec<ModelSource>,
    /// The address to listen on.
    pub host: IpAddr,
    /// The port; 0 for any free one.
    pub port: u16,
    /// The port for gRPC, if it is spoken; 0 for any free one.
    pub grpc_port: Option<u16>,
    /// Certificate and key, for HTTPS and gRPC over TLS.
    pub tls: Option<TlsFiles>,
    /// Worker threads.
    pub threads: usize,
    /// Longest text in tokens, if not what each model says.
    pub max_length: Option<usize>,
    /// What linears with float weights are multiplied in, see [`Model::pack_for`](quetsch::runtime::Model::pack_for).
    pub compute: Arithmetic,
    /// Whether longer texts are cut, where a request does not say.
    pub auto_truncate: bool,
    /// What clients must send as `Authorization: Bearer KEY`.
    pub api_key: Option<ApiKey>,
    /// Web pages of these origins may use this server; none may, if there is none.
    pub cors_allow_origin: Vec<HeaderValue>,
    /// How often to look whether a model directory has changed, and load it again if so.
    pub reload_interval: Option<Duration>,
    /// Limits.
    pub limits: Limits,
}

impl Config {
    /// Models on 127.0.0.1:3000, on all threads that this process may use.
    pub fn new(models: Vec<ModelSource>) -> Config {
        Config {
            models,
            host: Ipv4Addr::LOCALHOST.into(),
            port: 3000,
            grpc_port: None,
            tls: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            max_length: None,
            compute: Arithmetic::F32,
            auto_truncate: true,
            api_key: None,
            cors_allow_origin: vec![],
            reload_interval: None,
            limits: Limits::default(),
        }
    }

    /// Limits that no request could pass are mistakes.
    fn check(&self) -> Result<()> {
        let l = &self.limits;
        if l.max_client_batch_size == 0 || l.max_client_batch_size > l.max_concurrent_requests {
            return Err(Error::invalid(format!(
                "max_client_batch_size is {}, expected 1 to max_concurrent_requests ({}): a larger batch would never \
                 find room",
                l.max_client_batch_size, l.max_concurrent_requests
            )));
        }
        if self.reload_interval == Some(Duration::ZERO) {
            return Err(Error::invalid("the interval for looking at model directories must be above 0"));
        }
        if l.payload_limit == 0 || l.max_text_bytes == 0 || l.max_connections == 0 {
            return Err(Error::invalid("payload_limit, max_text_bytes and max_connections must be at least 1"));
        }
        Ok(())
    }
}

/// Serves until SIGTERM or Ctrl-C, then answers what was accepted and returns. `listening` is told the addresses, before
/// the models are loaded. On SIGHUP models and certificate are read again.
///
/// # Errors
/// A limit that makes no sense, an address that is taken, a certificate or a model that cannot be read, or requests
/// that are not answered when the time to stop is over.
pub fn run(config: Config, listening: impl FnOnce(Listening)) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.threads.clamp(1, 4)) // they parse and write JSON; the workers compute
        .enable_all()
        .build()
        .map_err(|e| Error::invalid(format!("cannot start the network threads: {e}")))?;
    let outcome = runtime.block_on(async {
        let stop = signal()?;
        serve(config, listening, stop, hang_up()?).await
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

#[cfg(unix)]
fn signal() -> Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen = |kind| signal(kind).map_err(|e| Error::invalid(format!("cannot listen for signals: {e}")));
    let (mut term, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Rings with every SIGHUP.
#[cfg(unix)]
fn hang_up() -> Result<Arc<Notify>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut hang_ups =
        signal(SignalKind::hangup()).map_err(|e| Error::invalid(format!("cannot listen for signals: {e}")))?;
    let reload = Arc::new(Notify::new());
    let ring = reload.clone();
    tokio::spawn(async move {
        while hang_ups.recv().await.is_some() {
            ring.notify_one();
        }
    });
    Ok(reload)
}

#[cfg(not(unix))]
fn hang_up() -> Result<Arc<Notify>> {
    Ok(Arc::new(Notify::new()))
}

#[cfg(not(unix))]
fn signal() -> Result<impl Future<Output = ()>> {
    Ok(async { drop(tokio::signal::ctrl_c().await) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_names() {
        let rows = [
            ("runs/int8", "int8", "runs/int8"),
            ("runs/int8/", "int8", "runs/int8/"),
            ("intents=runs/int8", "intents", "runs/int8"),
            ("intents=a=b", "intents", "a=b"),
            ("./a=b/c", "c", "./a=b/c"),
            ("..", "model", ".."),
        ];
        for (text, name, path) in rows {
            assert_eq!(ModelSource::parse(text), ModelSource { name: name.into(), path: path.into() }, "{text}");
        }
    }

    #[test]
    fn limits_that_nothing_passes_are_refused() {
        type Change = fn(&mut Limits);
        let rows: [(Change, bool); 4] = [
            (|_| {}, true),
            (|l| l.max_client_batch_size = 0, false),
            (|l| l.max_concurrent_requests = 31, false),
            (|l| l.payload_limit = 0, false),
        ];
        for (i, (change, good)) in rows.into_iter().enumerate() {
            let mut config = Config::new(vec![]);
            change(&mut config.limits);
            assert_eq!(config.check().is_ok(), good, "row {i}");
        }
    }
}
