using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// A model's tokenizer under the keys of GGUF: "gpt2" with its merges for a byte-level one, "llama"
/// with scores for SentencePiece's. Rows of the embedding that no token has become unused ones.
/// </summary>
internal static class GgufVocabulary
{
    // llama.cpp's kinds of tokens.
    private const int Normal = 1, Control = 3, UserDefined = 4, Unused = 5;

    // Below every merge, so that a piece which none makes is not preferred to one.
    private const float Unmerged = -1e9f;

    /// <param name="file">Takes the keys.</param>
    /// <param name="directory">The model's folder.</param>
    /// <param name="tokenizer">Its tokenizer.</param>
    /// <param name="rows">Rows of the embedding.</param>
    /// <param name="splits">llama.cpp's name of how the model's texts are split into words.</param>
    /// <exception cref="InputException">There are more tokens than rows.</exception>
    public static void Write(
        GgufFile file, string directory, Tokenizer tokenizer, int rows, string splits)
    {
        if (tokenizer.Size > rows)
            throw new InputException($"{directory}: the tokenizer has {tokenizer.Size:N0} tokens, "
                + $"the model {rows:N0} (vocab_size): they do not belong together");
        var tokens = new string[rows];
        var kinds = new int[rows];
        for (int id = 0; id < rows; id++) (tokens[id], kinds[id]) = ($"[PAD{id}]", Unused);
        foreach (var (token, id) in tokenizer.Vocabulary) (tokens[id], kinds[id]) = (token, Normal);
        float[]? scores = null;
        List<string>? merges = null;
        string json = Path.Combine(directory, "tokenizer.json"),
            model = Path.Combine(directory, "tokenizer.model");
        if (File.Exists(model)) scores = Pieces(model, tokens, kinds);
        else
        {
            var source = new TokenizerFile(
                InputFile.ReadAll(json, Tokenizer.MaxFileBytes), json);
            if (source.IsByteLevel)
                merges = [.. source.Merges.OrderBy(m => m.Rank)
                    .Select(m => $"{tokens[m.Left]} {tokens[m.Right]}")];
            else scores = Scores(source, tokens, kinds);
        }

        foreach (AddedToken token in tokenizer.Added)
            (tokens[token.Id], kinds[token.Id]) =
                (token.Content, tokenizer.IsSpecial(token.Id) ? Control : UserDefined);
        file.Add("tokenizer.ggml.model", merges is null ? "llama" : "gpt2");
        file.Add("tokenizer.ggml.pre", merges is null ? "default" : splits);
        file.Add("tokenizer.ggml.tokens", tokens);
        file.Add("tokenizer.ggml.token_type", kinds);
        if (scores is not null) file.Add("tokenizer.ggml.scores", scores);
        if (merges is not null) file.Add("tokenizer.ggml.merges", merges);
    }

    private static float[] Pieces(string path, string[] tokens, int[] kinds)
    {
        var source = new SentencePieceFile(
            InputFile.ReadAll(path, SentencePieceFile.MaxBytes), path);
        if (source.Kinds.Count > kinds.Length)
            throw new InputException($"{path}: has {source.Kinds.Count:N0} pieces, the model "
                + $"{kinds.Length:N0} (vocab_size): they do not belong together");
        // The kinds are SentencePiece's own. Behind a piece that is defined by the user llama.cpp
        // puts a space, which SentencePiece does not; a single letter, such as the line end, does
        // not need to be one, since it is in no other piece.
        for (int id = 0; id < source.Kinds.Count; id++)
            kinds[id] = source.Kinds[id] == SentencePieceFile.Kind.UserDefined
                && tokens[id].EnumerateRunes().Count() == 1 ? Normal : (int)source.Kinds[id];
        return Filled(kinds.Length, source.Scores);
    }

    // The order of merges as scores: the earliest one that makes a piece.
    private static float[] Scores(TokenizerFile source, string[] tokens, int[] kinds)
    {
        const int Unknown = 2, Byte = 6;
        var scores = new float[tokens.Length];
        Array.Fill(scores, Unmerged);
        foreach (var merge in source.Merges)
            scores[merge.Merged] = Math.Max(scores[merge.Merged], -merge.Rank);
        for (int id = 0; id < tokens.Length; id++)
        {
            if (VocabularyFile.ByteOf(tokens[id]) is not null) kinds[id] = Byte;
            else if (tokens[id] == source.Unknown) kinds[id] = Unknown;
        }

        return scores;
    }

    private static float[] Filled(int count, List<float> scores)
    {
        var all = new float[count];
        Array.Fill(all, Unmerged);
        scores.CopyTo(all);
        return all;
    }
}
