//! Responses: headers come back as they were, and answers that we make belong to their request.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_proto::request::{HEADER_BYTES, Request};
use qemu_proto::response::{Response, ResponseBody};
use qemu_proto::status::Status;

fuzz_target!(|input: (u32, [u8; HEADER_BYTES], [u8; HEADER_BYTES])| {
    let (epoch, answer, asked) = input;
    let response = Response::decode(&answer);
    assert_eq!(response.encode(), answer);
    match response.status() {
        Some(status) => {
            assert_eq!(status.code(), response.result);
            assert!(Status::ALL.contains(&status) && !status.text().is_empty());
        }
        None => assert!(Status::ALL.iter().all(|status| status.code() != response.result)),
    }
    let request = Request::decode(&asked);
    let done = Response::success(&request, epoch, response.body, response.data_length);
    check_answer(&request, &done, epoch);
    assert_eq!((done.status(), done.data_length), (Some(Status::Success), response.data_length));
    let status = Status::ALL[epoch as usize % Status::ALL.len()];
    let failed = Response::error(&request, status, epoch);
    check_answer(&request, &failed, epoch);
    assert_eq!((failed.status(), failed.data_length), (Some(status), 0));
    assert_eq!(failed.body, ResponseBody::NONE);
    assert_eq!(failed.encode()[20..], [0; 28]);
});

fn check_answer(request: &Request, response: &Response, epoch: u32) {
    let bytes = response.encode();
    assert_eq!((response.opcode, response.id, response.epoch), (request.opcode, request.id, epoch));
    // a body of another opcode reads differently, but no byte of it is lost
    let again = Response::decode(&bytes);
    assert_eq!(again.encode(), bytes);
    assert_eq!((again.result, again.data_length, again.id), (response.result, response.data_length, response.id));
}
