//! Gives a clone its own copy of what it shares. The sheep copies some objects at each request; an interruption between two
//! leaves what was copied.

use serde_json::json;

use crate::connect::Sheep;
use crate::exit::Failure;
use crate::progress::Progress;
use crate::requests;

/// Copies everything that a working VDI shares with what it was made from.
pub fn copy_shared(sheep: &mut Sheep, name: &str) -> Result<(), Failure> {
    let mut bar: Option<Progress> = None;
    let mut first = 0;
    loop {
        let answer = requests::administer(sheep, &json!({"do": "copy-shared", "name": name, "first": first}))?;
        let mut numbers = answer.split(' ').map(str::parse::<u64>);
        let (Some(Ok(_)), Some(Ok(done)), Some(Ok(total))) = (numbers.next(), numbers.next(), numbers.next()) else {
            return Err(Failure::system(format!("The sheep answered '{answer}' instead of how far it is")));
        };
        bar.get_or_insert_with(|| Progress::of_objects(total)).advance(done.saturating_sub(first));
        if done >= total || done <= first {
            return Ok(());
        }
        first = done;
    }
}

/// Takes the parent of a working VDI away that shares nothing with it.
pub fn detach(sheep: &mut Sheep, name: &str) -> Result<(), Failure> {
    requests::administer(sheep, &json!({"do": "detach", "name": name})).map(drop)
}
