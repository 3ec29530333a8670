//! Events of this program on stderr, and, with the feature `otlp`, spans to an OpenTelemetry collector. None of them
//! holds a user's text.

use anyhow::Result;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// How events are written, and where spans go.
#[derive(Clone, Debug, Default)]
pub struct Logs {
    /// One JSON object a line, with times.
    pub json: bool,
    /// A collector's address, http://HOST:4318/v1/traces.
    #[cfg(feature = "otlp")]
    pub otlp: Option<String>,
}

/// What has to be flushed before the program ends.
#[derive(Default)]
pub struct Guard {
    #[cfg(feature = "otlp")]
    provider: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        #[cfg(feature = "otlp")]
        if let Some(provider) = self.provider.take() {
            let _ = provider.shutdown(); // a collector that is gone is no reason to fail
        }
    }
}

/// Begins to log: by `RUST_LOG`, else by `-v`.
///
/// # Errors
/// A collector's address that is none.
pub fn start(quiet: bool, verbose: u8, logs: &Logs) -> Result<Guard> {
    let level = match (quiet, verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("quetsch={level}")));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match logs.json {
        true => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
        false => lines.without_time().boxed(),
    };
    let registry = tracing_subscriber::registry().with(lines.with_filter(filter));
    #[cfg(feature = "otlp")]
    if let Some(endpoint) = &logs.otlp {
        let provider = provider(endpoint)?;
        let tracer = opentelemetry::trace::TracerProvider::tracer(&provider, "quetsch");
        let spans = tracing_opentelemetry::layer().with_tracer(tracer).with_filter(EnvFilter::new("quetsch=info"));
        registry.with(spans).init();
        return Ok(Guard { provider: Some(provider) });
    }
    registry.init();
    Ok(Guard::default())
}

#[cfg(feature = "otlp")]
fn provider(endpoint: &str) -> Result<opentelemetry_sdk::trace::SdkTracerProvider> {
    use anyhow::Context;
    use opentelemetry_otlp::WithExportConfig;
    use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().with_endpoint(endpoint).build();
    let exporter = exporter.with_context(|| format!("--otlp-endpoint {endpoint}"))?;
    let resource = Resource::builder().with_service_name("quetsch").build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}
