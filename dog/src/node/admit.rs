//! `dog node admit`

use serde_json::json;

use crate::args::Admit;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Target};
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &Admit, target: Target) -> Result<Report, Failure> {
    let id = meaning::node_id(&typed.id)?;
    let node = requests::administer(&mut Sheep::connect(target)?, &json!({"do": "admit", "node": id}))?;
    Ok(Report::text(format!("node {node} is admitted; it comes in by itself within a second\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_sheep::FakeSheep;
    use serde_json::Value;

    #[test]
    fn an_id_is_checked_before_anybody_is_asked() {
        let fake = FakeSheep::in_cluster(Value::Null);
        run(&Admit { id: "3F9C".to_owned() }, fake.target).expect("admitted");
        assert!(run(&Admit { id: String::new() }, fake.target).is_err(), "nothing would fit everybody");
        assert_eq!(fake.kept().wishes, [json!({"do": "admit", "node": "3f9c"})]);
    }
}
