using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Metrics;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Generate;

/// <summary>What a model answers to a row.</summary>
/// <param name="Text">Without white space around, thoughts included.</param>
/// <param name="Ids">Its tokens, the stop token not.</param>
/// <param name="Ended">Whether it ended before max_new_tokens.</param>
public sealed record RowAnswer(string Text, int[] Ids, bool Ended);

/// <summary>
/// Answers the last questions of rows, in batches of rows of about equal length, the longest first:
/// what does not fit is known at once, and the memory of the first batch serves all.
/// </summary>
/// <param name="model">Answers.</param>
/// <param name="rows">The rows.</param>
/// <param name="settings">How tokens are chosen.</param>
/// <param name="counter">See <see cref="Generator"/>.</param>
public sealed class RowAnswerer(
    LoadedModel model, DataRows rows, GenerationSettings settings, StepCounter? counter = null)
{
    private readonly Generator _generator = new(model, counter);

    /// <param name="wanted">Which rows.</param>
    /// <param name="batchSize">Rows of a batch.</param>
    /// <param name="done">Called with each row's number and answer.</param>
    /// <param name="goesOn">Asked at each token; false leaves the rest unanswered, and the batch
    /// that is being answered.</param>
    /// <exception cref="BadRowException">A row cannot be asked.</exception>
    public void Run(IEnumerable<int> wanted, int batchSize, Action<int, RowAnswer> done,
        Func<bool> goesOn)
    {
        var prompts = wanted.Select(row => (Row: row, Prompt: rows.Prompt(row)))
            .OrderByDescending(item => item.Prompt.Tokens).ToList();
        if (prompts.Count == 0) return;
        _generator.Reserve(
            Math.Min(batchSize, prompts.Count) * settings.NumBeams,
            prompts[0].Prompt.Tokens + settings.MaxNewTokens);
        foreach (var batch in prompts.Chunk(batchSize))
        {
            if (!goesOn()) return;
            GeneratedTokens[] answers = _generator.Run([.. batch.Select(item => new GenerationInput(
                item.Prompt.Tokens, batch => item.Prompt.Append(batch, 0, item.Prompt.Tokens),
                (ulong)item.Row)
            {
                Pictures = item.Prompt.Pictures,
                AppendPart = item.Prompt.Append,
            })], settings, null, goesOn);
            if (!goesOn()) return;
            for (int i = 0; i < batch.Length; i++) done(batch[i].Row, Answer(answers[i]));
        }
    }

    /// <summary>
    /// The answer as it is scored against what the row expects: thoughts apart, unless that has
    /// some.
    /// </summary>
    public static ScoredAnswer Scored(Row row, RowAnswer answer, Tokenizer tokenizer)
    {
        string expected = row.Expected ?? "", text = answer.Text;
        if (!expected.Contains("</think>", StringComparison.Ordinal))
        {
            var fold = new ThoughtFold();
            text = fold.Add(text) + fold.End();
        }

        IReadOnlyList<string> references = row.References.Count > 0
            ? row.References : [expected];
        return new ScoredAnswer(text, references)
        {
            Tokens = (answer.Ids, tokenizer.Encode(expected)),
        };
    }

    private RowAnswer Answer(GeneratedTokens tokens)
    {
        int[] ids = tokens.Stopped ? tokens.Ids[..^1] : tokens.Ids;
        return new RowAnswer(
            PythonText.Strip(rows.Format.Tokenizer.Decode(ids)), ids, tokens.Stopped);
    }
}
