using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Rotary tables of tokens with places on canvases (V-4_7): a row for each token of the batch, put
/// together from the rows of its three places, so that every operation turns by one row a token.
/// Frequencies k = 1, 4, 7, ... are the rows', 2, 5, 8, ... the columns', as far as the sections
/// reach, all others the text's.
/// </summary>
internal sealed class CanvasRope(DecoderSpec spec)
{
    private readonly int _half = (spec.RotatedColumns ?? spec.HeadDim) / 2;
    private readonly Growing<float> _cos = new(), _sin = new();
    private (float[] Cos, float[] Sin) _table = ([], []);

    /// <summary>How many numbers it brings in besides the tokens' own.</summary>
    public long Count(Batch batch) => 2L * _half * batch.Places.Count;

    /// <summary>The row of each token, and F32[tokens, half] twice.</summary>
    public (Tensor Rows, Tensor Cos, Tensor Sin) Load(Batch batch, BatchUpload upload)
    {
        ReadOnlySpan<CanvasPlace> places = batch.Places.Span;
        int last = 0;
        foreach (CanvasPlace place in places) last = Math.Max(last, place.Largest);
        if (_table.Cos.Length <= last * _half)
            _table = spec.RopeTable(Math.Max(last + 1, 2 * _table.Cos.Length / _half));
        _cos.Clear();
        _sin.Clear();
        Span<float> cos = _cos.Extend(places.Length * _half);
        Span<float> sin = _sin.Extend(places.Length * _half);
        Growing<int> rows = upload.Scratch;
        rows.Clear();
        for (int t = 0; t < places.Length; t++)
        {
            rows.Add(t);
            for (int k = 0; k < _half; k++)
            {
                int from = (Place(places[t], k) * _half) + k, to = (t * _half) + k;
                (cos[to], sin[to]) = (_table.Cos[from], _table.Sin[from]);
            }
        }

        return (upload.Ints(rows.Span, "rotary rows"), Table(cos, "rope cos"),
            Table(sin, "rope sin"));

        Tensor Table(ReadOnlySpan<float> values, string name) =>
            upload.Floats(values, name).Reshape(values.Length / _half, _half);
    }

    private int Place(CanvasPlace place, int k) => (k % 3) switch
    {
        1 when k < 3 * spec.RopeSections[1] => place.Row,
        2 when k < 3 * spec.RopeSections[2] => place.Column,
        _ => place.Text,
    };
}
