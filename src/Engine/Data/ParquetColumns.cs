using System.Text.Json;
using Parquet;
using Parquet.Data;
using Parquet.Schema;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// The columns of one group of a Parquet file, put together to rows by their repetition and
/// definition levels (Melnik et al., Dremel, 2010) and written as JSON: each value is touched once,
/// and no objects are made of it. Nulls under a key are absent.
/// </summary>
internal sealed class ParquetColumns : IDisposable
{
    private readonly List<Leaf> _leaves = [];
    private readonly Node[] _fields;

    private ParquetColumns(Node[] fields) => _fields = fields;

    /// <summary>
    /// The columns of a group; null where the schema has lists of another form than the format
    /// prescribes today, maps, or nothing that is a row's.
    /// </summary>
    public static ParquetColumns? Read(ParquetReader file, int group)
    {
        var fields = file.Schema.Fields.Select(field => Node.Of(field, 0, 0)).ToArray();
        if (fields.Length == 0 || fields.Contains(null)) return null;
        using ParquetRowGroupReader reader = file.OpenRowGroupReader(group);
        var columns = new ParquetColumns(fields!);
        try
        {
            foreach (Node field in columns._fields)
                foreach (Leaf leaf in field.Leaves)
                {
                    columns._leaves.Add(leaf);
                    leaf.Take(reader.ReadRawColumnDataBaseAsync(leaf.Column)
                        .GetAwaiter().GetResult());
                }

            // One of them knows where its values end.
            if (columns._leaves.Exists(leaf => leaf.IsKnown)) return columns;
            columns.Dispose();
            return null;
        }
        catch
        {
            columns.Dispose();
            throw;
        }
    }

    /// <summary>Writes the next row.</summary>
    public void Write(Utf8JsonWriter json)
    {
        json.WriteStartObject();
        foreach (Node field in _fields) field.WriteMember(json);
        json.WriteEndObject();
    }

    public void Dispose()
    {
        foreach (Leaf leaf in _leaves) leaf.Dispose();
    }

    /// <summary>A field, with the definition level from which on it is there.</summary>
    private abstract class Node(Field field, int there)
    {
        protected int There { get; } = there;

        public abstract IEnumerable<Leaf> Leaves { get; }

        /// <summary>Whose levels say what is there.</summary>
        public abstract Leaf First { get; }

        public static Node? Of(Field field, int definition, int repetition)
        {
            int there = definition + (field.IsNullable ? 1 : 0);
            switch (field)
            {
                case DataField { IsArray: false } data:
                    return data.MaxDefinitionLevel == there && data.MaxRepetitionLevel == repetition
                        ? new Leaf(data, there) : null;
                case StructField group:
                    Node?[] members = [.. group.Fields.Select(f => Of(f, there, repetition))];
                    return members.Length > 0 && !members.Contains(null)
                        ? new Group(field, there, members!) : null;
                case ListField list:
                    return Of(list.Item, there + 1, repetition + 1) is { } item
                        ? new Items(field, there, repetition + 1, item) : null;
                default:
                    return null;
            }
        }

        public void WriteMember(Utf8JsonWriter json)
        {
            if (First.Definition < There)
            {
                Pass();
                return;
            }

            json.WritePropertyName(field.Name);
            WriteThere(json);
        }

        public void Write(Utf8JsonWriter json)
        {
            if (First.Definition >= There) WriteThere(json);
            else
            {
                json.WriteNullValue();
                Pass();
            }
        }

        protected abstract void WriteThere(Utf8JsonWriter json);

        protected void Pass()
        {
            foreach (Leaf leaf in Leaves) leaf.Next();
        }
    }

    private sealed class Group(Field field, int there, Node[] members) : Node(field, there)
    {
        public override IEnumerable<Leaf> Leaves => members.SelectMany(member => member.Leaves);

        public override Leaf First => members[0].First;

        protected override void WriteThere(Utf8JsonWriter json)
        {
            json.WriteStartObject();
            foreach (Node member in members) member.WriteMember(json);
            json.WriteEndObject();
        }
    }

    private sealed class Items(Field field, int there, int repetition, Node item)
        : Node(field, there)
    {
        public override IEnumerable<Leaf> Leaves => item.Leaves;

        public override Leaf First => item.First;

        protected override void WriteThere(Utf8JsonWriter json)
        {
            json.WriteStartArray();
            if (First.Definition > There)
                do item.Write(json);
                while (First.Repetition >= repetition);
            else Pass();
            json.WriteEndArray();
        }
    }

    private sealed class Leaf(DataField column, int there) : Node(column, there), IDisposable
    {
        private RawColumnData? _data;
        private int[] _definitions = [], _repetitions = [];
        private ReadOnlyMemory<char>[] _texts = [];
        private int _at, _value;

        public DataField Column => column;

        /// <summary>Takes the column; what is asked for often is copied out of it once.</summary>
        public void Take(RawColumnData data)
        {
            _data = data;
            if (column.MaxDefinitionLevel > 0) _definitions = data.DefinitionLevels.ToArray();
            if (column.MaxRepetitionLevel > 0) _repetitions = data.RepetitionLevels.ToArray();
            if (data is RawColumnData<ReadOnlyMemory<char>> texts) _texts = texts.Values.ToArray();
        }

        public bool IsKnown => _data is RawColumnData<ReadOnlyMemory<char>>
            or RawColumnData<ReadOnlyMemory<byte>> or RawColumnData<bool> or RawColumnData<int>
            or RawColumnData<long> or RawColumnData<float> or RawColumnData<double>;

        public override IEnumerable<Leaf> Leaves => [this];

        public override Leaf First => this;

        /// <summary>Of what comes next.</summary>
        public int Definition => column.MaxDefinitionLevel == 0 ? 0 : _definitions[_at];

        /// <summary>The same; 0 at the end.</summary>
        public int Repetition => _at < _repetitions.Length ? _repetitions[_at] : 0;

        public void Next() => _at++;

        public void Dispose() => _data?.Dispose();

        protected override void WriteThere(Utf8JsonWriter json)
        {
            int i = _value++;
            _at++;
            switch (_data)
            {
                case RawColumnData<ReadOnlyMemory<char>>:
                    json.WriteStringValue(_texts[i].Span);
                    break;
                case RawColumnData<ReadOnlyMemory<byte>> c:
                    json.WriteBase64StringValue(c.Values[i].Span);
                    break;
                case RawColumnData<bool> c: json.WriteBooleanValue(c.Values[i]); break;
                case RawColumnData<int> c: json.WriteNumberValue(c.Values[i]); break;
                case RawColumnData<long> c: json.WriteNumberValue(c.Values[i]); break;
                case RawColumnData<float> c: Number(json, c.Values[i]); break;
                case RawColumnData<double> c: Number(json, c.Values[i]); break;
                // Dates and the like are nothing that a row has use for, but under a key of its
                // own they harm no one.
                default: json.WriteNullValue(); break;
            }
        }

        private static void Number(Utf8JsonWriter json, double number)
        {
            if (double.IsFinite(number)) json.WriteNumberValue(number);
            else json.WriteNullValue();
        }
    }
}
