using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// tokenizer.model, the ModelProto of SentencePiece (sentencepiece_model.proto), of type BPE. Read
/// strictly: what would change ids or text is either understood or refused by name.
/// </summary>
internal sealed class SentencePieceFile : VocabularyFile
{
    public const long MaxBytes = 16 << 20;

    private const int MaxPiece = 256;

    /// <summary>SentencePiece.Type.</summary>
    public enum Kind
    {
        Normal = 1, Unknown, Control, UserDefined, Unused, Byte,
    }

    private readonly string _path;
    private readonly Dictionary<string, int> _mergeable = new(StringComparer.Ordinal);
    private bool _prepends = true, _removesExtra = true;
    private CharacterMap? _characters;

    public override TextNormalizer Normalizer { get; }
    public override bool Slow => true;

    /// <summary>Kind of every piece, by id.</summary>
    public List<Kind> Kinds { get; } = [];

    /// <summary>Score of every piece, by id.</summary>
    public List<float> Scores { get; } = [];

    /// <summary>What the unknown token decodes to.</summary>
    public string UnknownSurface { get; private set; } = " \u2047 ";

    /// <summary>Names of the first control pieces, BOS and EOS.</summary>
    public string Begin { get; private set; } = "<s>";

    /// <inheritdoc cref="Begin"/>
    public string End { get; private set; } = "</s>";

    /// <summary>Pieces that are cut out of a text and never merged.</summary>
    public AddedTokens UserDefined { get; }

    /// <summary>
    /// What merges: normal pieces, and letters which only longer pieces have, with ids above all
    /// pieces'.
    /// </summary>
    public Dictionary<string, int> Mergeable => _mergeable;

    /// <summary>Decoding takes a leading space away that encoding has put there.</summary>
    public bool StripsSpace => _prepends || _removesExtra;

    /// <inheritdoc cref="StripsSpace"/>
    public bool StripsSpaces => _removesExtra;

    /// <exception cref="InputException">No SentencePiece model, or none of type BPE.</exception>
    public SentencePieceFile(ReadOnlySpan<byte> model, string path) : base(path)
    {
        _path = path;
        int type = 1;
        var pieces = new List<(string Text, float Score)>();
        var reader = new ProtobufReader(model, path);
        while (reader.Next())
            switch (reader.Field)
            {
                case 1: ReadPiece(reader.Bytes(), pieces); break;
                case 2: ReadTrainer(reader.Bytes(), ref type); break;
                case 3: ReadNormalizer(reader.Bytes()); break;
                case 5: ReadDenormalizer(reader.Bytes()); break;
                default: reader.Skip(); break;
            }
        if (pieces.Count == 0) throw Bad("has no pieces; expected a SentencePiece model");
        if (type != 2)
            throw Bad($"model_type is {(type == 1 ? "UNIGRAM" : type)}, only BPE (2) is supported");
        if (Unknown is null) throw Bad("has no unknown piece");
        FusesUnknown = true;
        CheckByteTokens();
        UserDefined = new AddedTokens(pieces.Index().Where(p => Kinds[p.Index] == Kind.UserDefined)
            .Select(p => new AddedToken(p.Index, p.Item.Text, false, false, false, false, false)));
        Normalizer =
            new SentencePieceNormalizer(_characters, UserDefined, _prepends, _removesExtra);
        AddMerges(pieces);
    }

    private void ReadPiece(ReadOnlySpan<byte> bytes, List<(string Text, float Score)> pieces)
    {
        (string text, float score, var kind) = ("", 0, Kind.Normal);
        var reader = new ProtobufReader(bytes, _path);
        while (reader.Next())
            switch (reader.Field)
            {
                case 1: text = reader.Text(); break;
                case 2: score = reader.Single(); break;
                case 3: kind = (Kind)reader.Integer(); break;
                default: reader.Skip(); break;
            }
        string which = $"piece {pieces.Count} {Messages.Quote(text)}";
        if (kind is < Kind.Normal or > Kind.Byte or Kind.Unused)
            throw Bad($"{which} is of kind {(kind == Kind.Unused ? "UNUSED" : $"{(int)kind}")}, "
                + "which is not supported");
        if (text.Length is 0 or > MaxPiece || float.IsNaN(score))
            throw Bad($"{which} is empty, has more than {MaxPiece} letters or no score");
        if (kind == Kind.Byte && ByteOf(text) is null) throw Bad($"{which} is no byte");
        if (!Vocabulary.TryAdd(text, pieces.Count)) throw Bad($"{which} is there twice");
        if (kind == Kind.Unknown && Unknown is not null)
            throw Bad($"{which} is a second unknown piece");
        if (kind == Kind.Unknown) Unknown = text;
        pieces.Add((text, score));
        Kinds.Add(kind);
        Scores.Add(score);
    }

    private void ReadTrainer(ReadOnlySpan<byte> bytes, ref int type)
    {
        var reader = new ProtobufReader(bytes, _path);
        while (reader.Next())
            switch (reader.Field)
            {
                case 3: type = (int)reader.Integer(); break;
                case 24:
                    if (reader.Flag()) throw Bad("treat_whitespace_as_suffix is not supported");
                    break;
                case 35: ByteFallback = reader.Flag(); break;
                case 44: UnknownSurface = reader.Text(); break;
                case 46: Begin = reader.Text(); break;
                case 47: End = reader.Text(); break;
                default: reader.Skip(); break;
            }
    }

    private void ReadNormalizer(ReadOnlySpan<byte> bytes)
    {
        var reader = new ProtobufReader(bytes, _path);
        while (reader.Next())
            switch (reader.Field)
            {
                case 2:
                    var map = reader.Bytes();
                    _characters = map.IsEmpty ? null : new CharacterMap(map, _path);
                    break;
                case 3: _prepends = reader.Flag(); break;
                case 4: _removesExtra = reader.Flag(); break;
                case 5:
                    if (!reader.Flag()) throw Bad("escape_whitespaces false is not supported");
                    break;
                default: reader.Skip(); break;
            }
    }

    private void ReadDenormalizer(ReadOnlySpan<byte> bytes)
    {
        var reader = new ProtobufReader(bytes, _path);
        while (reader.Next())
            if (reader.Field == 2 && !reader.Bytes().IsEmpty)
                throw Bad("denormalizer_spec is not supported");
            else if (reader.Field != 2) reader.Skip();
    }

    // SentencePiece merges any two neighbours that make a piece, the best score first. As merges:
    // every cut of every piece, in order of score, of one piece the longest left part first.
    private void AddMerges(List<(string Text, float Score)> pieces)
    {
        int[] normal = [.. Enumerable.Range(0, pieces.Count)
            .Where(id => Kinds[id] == Kind.Normal).OrderByDescending(id => pieces[id].Score)];
        foreach (int id in normal)
        {
            _mergeable[pieces[id].Text] = id;
            foreach (var letter in pieces[id].Text.EnumerateRunes())
                _mergeable.TryAdd(letter.ToString(), -1);
        }
        int next = pieces.Count;
        foreach (string letter in _mergeable.Where(pair => pair.Value < 0)
            .Select(pair => pair.Key).ToArray())
            _mergeable[letter] = next++;
        var lookup = _mergeable.GetAlternateLookup<ReadOnlySpan<char>>();
        bool ties = normal.Zip(normal.Skip(1))
            .Any(pair => pieces[pair.First].Score == pieces[pair.Second].Score);
        int rank = 0;
        float last = float.NaN;
        foreach (int id in normal)
        {
            var (text, score) = pieces[id];
            if (ties && score != last) rank++;
            last = score;
            for (int cut = text.Length - 1; cut > 0; cut--)
                if (lookup.TryGetValue(text.AsSpan(0, cut), out int left)
                    && lookup.TryGetValue(text.AsSpan(cut), out int right))
                    Merges.Add(new(left, right, id, ties ? rank : rank++));
        }
    }
}
