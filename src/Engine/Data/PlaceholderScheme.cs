using System.Globalization;
using System.Text;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// The text that stands for a picture, and where its views lie in the tokens. Every view is
/// &lt;image&gt;unk*Q&lt;/image&gt; with Q tokens, one for each feature: a resampler's
/// queries, or, where features are merged patches, as many as the view has; for a sliced picture a
/// line of tiles per row follows. Since V-2_6 a tile is &lt;slice&gt;unk*Q&lt;/slice&gt; and a
/// picture may carry its number, &lt;image_id&gt;k&lt;/image_id&gt;, in front. Before, tiles are
/// written like pictures, all of them between one &lt;slice&gt; and &lt;/slice&gt;, and there are
/// no numbers. The tokens are the checkpoint's own.
/// </summary>
public sealed class PlaceholderScheme
{
    private readonly PlaceholderTokens _tokens;
    private readonly bool _marksTiles;
    private readonly int _queries, _side;
    private readonly int _imageStart, _imageEnd, _sliceStart, _sliceEnd;

    private PlaceholderScheme(
        Tokenizer tokenizer, PlaceholderTokens tokens, int queries, int side, bool marksTiles,
        string place)
    {
        (_tokens, _queries, _side, _marksTiles) = (tokens, queries, side, marksTiles);
        _imageStart = Id(tokens.ImageStart);
        _imageEnd = Id(tokens.ImageEnd);
        _sliceStart = Id(tokens.SliceStart);
        _sliceEnd = Id(tokens.SliceEnd);
        UnknownId = Id(tokens.Unknown);
        Markers = [tokens.ImageStart, tokens.ImageEnd, tokens.SliceStart, tokens.SliceEnd,
            tokens.Unknown];
        if (!marksTiles) return;
        Id(tokens.ImageIdStart);
        Id(tokens.ImageIdEnd);
        Markers = [.. Markers, tokens.ImageIdStart, tokens.ImageIdEnd];
        VideoId = tokens.Video is null ? null : tokenizer.IdOfAdded(tokens.Video);
        if (VideoId is null) return;
        Markers = [.. Markers, tokens.Video!];

        int Id(string token) => tokenizer.Require(token, place);
    }

    /// <summary>The token that holds a feature row's place.</summary>
    public int UnknownId { get; }

    /// <summary>The token of places in the frames of videos, where that is another.</summary>
    public int? VideoId { get; }

    /// <summary>The scheme's tokens; a text that holds one would be read as a picture.</summary>
    public IReadOnlyList<string> Markers { get; }

    /// <summary>Tiles between a pair of their own, numbers (V-2_6 and later).</summary>
    /// <exception cref="InputException">The tokenizer lacks one of the tokens.</exception>
    public static PlaceholderScheme New(
        Tokenizer tokenizer, PlaceholderTokens tokens, int queries, string place = "tokenizer") =>
        new(tokenizer, tokens, queries, 0, marksTiles: true, place);

    /// <summary>The same with a feature for each square of so many pixels a side (V-4_6).</summary>
    /// <inheritdoc cref="New"/>
    public static PlaceholderScheme Merged(
        Tokenizer tokenizer, PlaceholderTokens tokens, int side, string place = "tokenizer") =>
        new(tokenizer, tokens, 0, side, marksTiles: true, place);

    /// <summary>Tiles like pictures in one pair around all, no numbers (V-2, V-2_5).</summary>
    /// <inheritdoc cref="New"/>
    public static PlaceholderScheme Old(
        Tokenizer tokenizer, PlaceholderTokens tokens, int queries, string place = "tokenizer") =>
        new(tokenizer, tokens, queries, 0, marksTiles: false, place);

    /// <summary>Feature rows of a view: 0 is the overview, then the tiles.</summary>
    public int Features(SlicePlan plan, int view) => Grid(plan, view).Patches;

    /// <summary>How they lie; a resampler's in one row.</summary>
    public PatchGrid Grid(SlicePlan plan, int view)
    {
        PictureSize size = plan.Size(view);
        return _side == 0
            ? new(1, _queries) : new(size.Height / _side, size.Width / _side);
    }

    /// <summary>Feature rows of all views of a picture.</summary>
    public int Features(SlicePlan plan)
    {
        int features = 0;
        for (int view = 0; view < plan.Views; view++) features += Features(plan, view);
        return features;
    }

    /// <summary>A picture's text.</summary>
    /// <param name="plan">How it is cut.</param>
    /// <param name="number">Its number, or null; the old scheme writes none.</param>
    /// <param name="isFrame">Of a video, where those have a token of their own.</param>
    public string Text(SlicePlan plan, int? number, bool isFrame = false)
    {
        string unknown = isFrame && VideoId is not null ? _tokens.Video! : _tokens.Unknown;
        var text = new StringBuilder();
        if (number is not null && _marksTiles)
            text.Append(_tokens.ImageIdStart).Append(CultureInfo.InvariantCulture, $"{number}")
                .Append(_tokens.ImageIdEnd);
        View(0, _tokens.ImageStart, _tokens.ImageEnd);
        if (!plan.Sliced) return text.ToString();
        if (!_marksTiles) text.Append(_tokens.SliceStart);
        for (int row = 0; row < plan.Rows; row++)
        {
            if (row > 0) text.Append('\n');
            for (int column = 0; column < plan.Columns; column++)
            {
                int view = 1 + (row * plan.Columns) + column;
                if (_marksTiles) View(view, _tokens.SliceStart, _tokens.SliceEnd);
                else View(view, _tokens.ImageStart, _tokens.ImageEnd);
            }
        }

        if (!_marksTiles) text.Append(_tokens.SliceEnd);
        return text.ToString();

        void View(int view, string start, string end) => text.Append(start)
            .Insert(text.Length, unknown, Features(plan, view)).Append(end);
    }

    /// <summary>The views in ids; null when starts and ends do not pair up.</summary>
    public ImageBound[]? Bounds(ReadOnlySpan<int> ids)
    {
        var starts = new List<int>();
        var ends = new List<int>();
        for (int i = 0; i < ids.Length; i++)
            if (ids[i] == _imageStart || (_marksTiles && ids[i] == _sliceStart)) starts.Add(i + 1);
            else if (ids[i] == _imageEnd || (_marksTiles && ids[i] == _sliceEnd)) ends.Add(i);
        return starts.Count != ends.Count ? null
            : [.. starts.Zip(ends, (start, end) => new ImageBound(start, end))];
    }
}
