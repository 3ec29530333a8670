//! Counters and histograms under the names of Hugging Face's text-embeddings-inference, so that its dashboards work.

use crate::engine::Timing;
use crate::refusal::Refusal;
use metrics::{counter, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::sync::OnceLock;

/// Seconds: 0.1 ms to 13 s, each twice the one before.
const DURATIONS: [f64; 18] = {
    let mut bounds = [1e-4; 18];
    let mut i = 1;
    while i < bounds.len() {
        bounds[i] = 2.0 * bounds[i - 1];
        i += 1;
    }
    bounds
};

/// Tokens and sentences: powers of two.
const SIZES: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0];

/// The recorder of this process; several servers in one process share it.
pub fn recorder() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_duration".into()), &DURATIONS)
            .and_then(|b| b.set_buckets_for_metric(Matcher::Prefix("te_batch_next".into()), &SIZES))
            .and_then(|b| b.set_buckets_for_metric(Matcher::Full("te_request_input_length".into()), &SIZES))
            .expect("the lists of bounds are not empty")
            .build_recorder();
        let handle = recorder.handle();
        // An application that brought its own recorder keeps it, and /metrics is empty.
        let _ = metrics::set_global_recorder(recorder);
        handle
    })
}

/// A request of one text or of several came in.
pub fn arrived(method: &'static str) {
    counter!("te_request_count", "method" => method).increment(1);
}

/// It was answered.
pub fn answered(method: &'static str, timing: &Timing) {
    counter!("te_request_success", "method" => method).increment(1);
    histogram!("te_request_duration").record(timing.total.as_secs_f64());
    histogram!("te_request_tokenization_duration").record(timing.tokenization.as_secs_f64());
    histogram!("te_request_queue_duration").record(timing.queue.as_secs_f64());
    histogram!("te_request_inference_duration").record(timing.inference.as_secs_f64());
}

/// It was not.
pub fn failed(refusal: &Refusal) {
    counter!("te_request_failure", "err" => refusal.kind()).increment(1);
}
