//! `quetsch serve`: flags for the server in `quetsch_serve`.

use crate::hub;
use crate::logs::Logs;
use crate::settings::ComputeIn;
use crate::ui::{self, Ui};
use anyhow::Result;
use clap::{ArgAction, Args};
use quetsch_serve::{ApiKey, Config, HeaderValue, Limits, Listening, ModelSource, TlsFiles};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Flags of `serve`.
#[derive(Args)]
pub struct Serve {
    /// Model directory or ORG/NAME on the hub, or NAME=DIR; may be given several times, the first is the one for requests that name none
    #[arg(long, value_name = "DIR", required = true)]
    model: Vec<String>,
    /// Address to listen on; 0.0.0.0 for all networks
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port; 0 for any free one, which is printed
    #[arg(long, default_value_t = 3000)]
    port: u16,
    /// Port for gRPC (Open Inference Protocol v2); 0 for any free one, which is printed
    #[arg(long, value_name = "PORT")]
    grpc_port: Option<u16>,
    /// Certificate chain, PEM: HTTPS, and gRPC over TLS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Look every so many seconds whether a model directory has changed, and load it again; SIGHUP does so at once
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    reload_interval: Option<u64>,
    /// Origin of web pages that may use this server, as https://example.com; may be given several times
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    cors_allow_origin: Vec<HeaderValue>,
    /// Longest text in tokens [default: what the model says, else 256]
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<usize>,
    /// What linears with float weights are multiplied in
    #[arg(long, value_enum, default_value_t)]
    compute: ComputeIn,
    /// Cut longer texts where a request does not say; with false they are refused
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    auto_truncate: bool,
    /// Texts that may wait; beyond them requests get 429
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_concurrent_requests)]
    max_concurrent_requests: usize,
    /// Tokens computed at once by one thread
    #[arg(long, value_name = "TOKENS", default_value_t = Limits::default().max_batch_tokens)]
    max_batch_tokens: usize,
    /// Texts in one request
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_client_batch_size)]
    max_client_batch_size: usize,
    /// Largest body of a request in bytes
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().payload_limit)]
    payload_limit: usize,
    /// Seconds to answer what was accepted after SIGTERM or Ctrl-C
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().drain_timeout.as_secs())]
    drain_timeout: u64,
    /// Key that clients must send as `Authorization: Bearer KEY`; better given as QUETSCH_API_KEY
    #[arg(long, value_name = "KEY", value_parser = key)]
    api_key: Option<ApiKey>,
    /// Log one JSON object a line, with times
    #[arg(long)]
    json_output: bool,
    /// Send a span of every request to an OpenTelemetry collector, as http://localhost:4318/v1/traces
    #[cfg(feature = "otlp")]
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
}

impl Serve {
    /// How it logs.
    pub fn logs(&self) -> Logs {
        Logs {
            json: self.json_output,
            #[cfg(feature = "otlp")]
            otlp: self.otlp_endpoint.clone(),
        }
    }
}

// `Command` wants it; by hand, so that not even a key's hash is printed.
impl std::fmt::Debug for Serve {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Serve").field("model", &self.model).finish_non_exhaustive()
    }
}

fn key(text: &str) -> Result<ApiKey, String> {
    match text.is_empty() {
        true => Err("an empty key is no key".into()),
        false => Ok(ApiKey::new(text)),
    }
}

fn origin(text: &str) -> Result<HeaderValue, String> {
    match text.split_once("://") {
        Some(("http" | "https", host)) if !host.is_empty() && !host.contains('/') => {
            HeaderValue::from_str(text).map_err(|e| e.to_string())
        }
        _ => Err("expected an origin such as https://example.com".into()),
    }
}

/// Runs `serve`.
pub fn run(s: &Serve, ui: &Ui) -> Result<()> {
    let local = |model: &String| -> Result<ModelSource> {
        let source = ModelSource::parse(model);
        Ok(ModelSource { path: hub::model(&source.path, None, ui)?, ..source })
    };
    let mut config = Config::new(s.model.iter().map(local).collect::<Result<_>>()?);
    config.host = s.host;
    config.port = s.port;
    config.grpc_port = s.grpc_port;
    config.tls = s.tls_cert.clone().zip(s.tls_key.clone()).map(|(cert, key)| TlsFiles { cert, key });
    config.reload_interval = s.reload_interval.map(Duration::from_secs);
    config.cors_allow_origin = s.cors_allow_origin.clone();
    config.threads = ui.threads(None);
    config.max_length = s.max_length;
    config.compute = s.compute.into();
    config.auto_truncate = s.auto_truncate;
    config.api_key = s.api_key;
    config.limits = Limits {
        max_concurrent_requests: s.max_concurrent_requests,
        max_batch_tokens: s.max_batch_tokens,
        max_client_batch_size: s.max_client_batch_size,
        payload_limit: s.payload_limit,
        drain_timeout: Duration::from_secs(s.drain_timeout),
        ..Limits::default()
    };
    if s.api_key.is_none() && !s.host.is_loopback() {
        ui.warn(format!("{} can be reached by others, and no --api-key is set", s.host));
    }
    let (human, scheme) = (ui.human(), if config.tls.is_some() { "https" } else { "http" });
    let listening = move |at: Listening| {
        let http = format!("{scheme}://{}", at.http);
        let line = match (human, at.grpc) {
            (true, None) => format!("listening on {http}\n"),
            (true, Some(grpc)) => format!("listening on {http}, gRPC on {grpc}\n"),
            (false, grpc) => format!("{}\n", serde_json::json!({ "listening": http, "grpc": grpc })),
        };
        let _ = ui::out(&line); // nobody reads it: no reason to stop
    };
    quetsch_serve::run(config, listening)?;
    ui.note("stopped");
    Ok(())
}
